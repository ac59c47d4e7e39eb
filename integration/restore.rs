//! Containers made of images.

use std::path::Path;
use std::process::Command;

use crate::containers::{bundle, init_of, ours};
use crate::support::container::{Containers, unique};
use crate::support::fixture::Fixture;
use crate::support::session::{DONE, Session};
use crate::support::wait;

/// `restore` in the foreground, so that commands and answers pass.
fn restored(session: &Session, bundle: &Path, image: &Path, id: &str) -> Command {
    let mut command = session.command();
    command
        .arg("restore")
        .arg("--verify")
        .arg("--bundle")
        .arg(bundle);
    command.arg("--image-path").arg(image).arg(id);
    command
}

/// A fixture program in a container: persisted, changed, killed, restored; it finds all as it was, and is rolled back twice.
#[track_caller]
fn comes_back(program: &str, options: &[&str]) {
    let containers = Containers::new();
    let session = &containers.session;
    let bundle = bundle(&containers, program, options);
    let image = session.scratch().join("image");
    let path = image.to_str().expect("a path in UTF-8");
    let id = unique(&format!("persisted-{program}"));
    let mut fixture = Fixture::launch(program, ours(session, &bundle, &id));
    fixture.verify("before the checkpoint");
    let run = |arguments: &[&str]| session.run(arguments).expect(DONE, arguments[0]);
    run(&["checkpoint", "--no-files", &id]);
    fixture.mutate();
    run(&["persist", "--image-path", path, &id]);
    run(&["kill", &id, "KILL"]);
    wait::until("the container has ended", || {
        matches!(fixture.family.child.try_wait(), Ok(Some(_)))
    });

    let id = unique(&format!("restored-{program}"));
    let mut fixture = Fixture::take_over(program, restored(session, &bundle, &image, &id));
    wait::until("the container runs, or restore has ended", || {
        let listed = session.run(&["list", "--format", "json"]);
        let ended = matches!(fixture.family.child.try_wait(), Ok(Some(_)));
        ended || listed.out.contains("\"running\"")
    });
    fixture.verify("after it was restored");
    for round in 0..2 {
        fixture.mutate();
        run(&["rollback", "--verify", &id]);
        fixture.verify(&format!("after rollback {round}"));
        fixture.run_on();
    }
    run(&["release", "--all", &id]);
    fixture.verify("after the release");
    fixture.send(b"q");
    wait::until("the container has ended", || {
        matches!(fixture.family.child.try_wait(), Ok(Some(_)))
    });
    let _ = init_of;
}

#[test]
fn one_program() {
    let program = std::env::var("RESTORE_PROGRAM").unwrap_or("brk_grow".into());
    comes_back(&program, &[]);
}
