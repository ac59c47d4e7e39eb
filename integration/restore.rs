//! Containers made of checkpoints that were taken elsewhere.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::Stdio;

use snapback::engine::{Engine, RollbackOptions, Target};
use snapback::filesystem;

use crate::containers::{bundle, init_of, ours};
use crate::support::container::{Containers, unique};
use crate::support::fixture::{Fixture, build_directory};
use crate::support::session::DONE;

#[test]
fn engine_makes_a_second_container() {
    let program = std::env::var("RESTORE_PROGRAM").unwrap_or("brk_grow".into());
    let _ = build_directory();
    let containers = Containers::new();
    let session = &containers.session;
    let bundle: PathBuf = bundle(&containers, &program, &[]);
    let id = unique(&format!("one-{program}"));
    let mut fixture = Fixture::launch(&program, ours(session, &bundle, &id));
    let init = init_of(fixture.pid(), &program).expect("an init");
    let mut engine = Engine::attach(Target::of_pid(init)).expect("attach");
    engine.take("x").expect("checkpoint");
    fixture.mutate();

    let second = unique(&format!("two-{program}"));
    let mut command = session.command();
    command
        .arg("create")
        .arg("--bundle")
        .arg(&bundle)
        .arg(&second);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("create");
    let (mut commands, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    assert!(child.wait().unwrap().success());
    let pid = containers.pid(&second);
    let origin = engine.origin("x").expect("origin");
    let (mut restored, report) = Engine::restore(
        Target::of_pid(pid),
        filesystem::Options {
            include: false,
            ..Default::default()
        },
        &origin,
        "x",
        RollbackOptions { verify: true },
    )
    .expect("restore");
    eprintln!("{report:#?}");
    let mut answers = BufReader::new(answers);
    let mut ask = |command: u8| {
        commands.write_all(&[command]).unwrap();
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        line.trim().to_owned()
    };
    for round in 0..2 {
        assert_eq!(ask(b'v'), "PASS", "{round}");
        assert_eq!(ask(b'm'), "MUTATED", "{round}");
        restored
            .rollback("x", RollbackOptions { verify: true })
            .expect("rollback");
        assert_eq!(ask(b'v'), "PASS", "{round}");
        assert_eq!(ask(b'r'), "OK", "{round}");
    }
    engine
        .rollback("x", RollbackOptions { verify: true })
        .expect("rollback of the first");
    fixture.verify("the first");
    let _ = DONE;
}
