//! Processes that have ended since the checkpoint, in real programs, and with several checkpoints.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::fixture::{Fixture, real};
use crate::support::nginx::{self, Nginx};
use crate::support::session::{DONE, Session};
use crate::support::{numbers, skip, wait};

/// Rollbacks per program.
const ROUNDS: usize = 20;

/// A program of `fixtures/real` that kills its processes.
#[track_caller]
fn killed_again_and_again(name: &str, shell: &str) {
    let mut command = Command::new(shell);
    command.arg(real(name));
    killed_and_used(name, command, 1);
}

/// The same, where only every so many rounds it is used in between.
#[track_caller]
fn killed_and_used(name: &str, command: Command, every: usize) {
    let mut session = Session::new();
    let mut program = Fixture::launch(name, command);
    program.verify("before the checkpoint");
    session.checkpoint(program.pid());
    for round in 0..ROUNDS {
        program.mutate();
        if round == 0 {
            let answer = program.ask(b'v');
            assert!(answer.starts_with("FAIL "), "not wrecked: {answer}");
        }
        let answer = session.rollback(program.pid());
        assert!(answer.number("revived") >= 2, "{answer:#?}");
        program.verify(&format!("after rollback {round}"));
        if round % every == 0 {
            program.run_on();
            program.verify("after it ran on");
        }
    }
    session.release(program.pid()).expect(DONE, "release");
    program.verify("after the release");
}

/// A parallel make goes on where it was, with its jobs and those of the make below it, and ends with all done once.
#[test]
fn make_in_the_middle() {
    if !Path::new("/usr/bin/python3").exists() {
        skip!("no python3");
    }
    // Numbers of a namespace of its own, as in a container: others would take those of its many processes.
    let mut command = Command::new("unshare");
    let options = ["--pid", "--fork", "--kill-child", "--mount-proc"];
    command.args(options).arg("python3").arg(real("make.py"));
    killed_and_used("make.py", command, ROUNDS / 2);
}

#[test]
fn python_pool() {
    if !Path::new("/usr/bin/python3").exists() {
        skip!("no python3");
    }
    killed_again_and_again("pool.py", "python3");
}

#[test]
fn shell_pipeline() {
    killed_again_and_again("pipeline.sh", "bash");
}

/// The page that an nginx serves.
fn get(port: u16) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET /page HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    let mut body = String::new();
    reader.read_to_string(&mut body)?;
    Ok(body)
}

/// The workers of an nginx.
fn workers_of(master: i32) -> Vec<i32> {
    let is_worker = |pid: &i32| {
        let title = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        title.starts_with(b"nginx: worker")
    };
    let all = numbers::processes().into_iter();
    all.filter(|(_, stat)| stat.parent == master)
        .map(|(pid, _)| pid)
        .filter(is_worker)
        .collect()
}

/// nginx, whose workers have other users than their master, killed and replaced by a reload.
#[test]
fn nginx_workers() {
    if !nginx::is_there() {
        skip!("no nginx");
    }
    let Nginx { master, port, .. } = &Nginx::start("a page", "", "");
    let port = *port;
    wait::until("nginx answers", || get(port).is_ok());
    wait::until("both workers run", || master.members().len() == 3);
    let members = master.members();

    let mut session = Session::new();
    session.checkpoint(master.pid());
    for round in 0..ROUNDS {
        let workers = members.iter().filter(|pid| **pid != master.pid());
        if round % 2 == 0 {
            for worker in workers {
                kill(Pid::from_raw(*worker), Signal::SIGKILL).expect("killing a worker");
            }
        } else {
            kill(Pid::from_raw(master.pid()), Signal::SIGHUP).expect("reloading");
        }
        wait::until("nginx has other workers", || {
            let now = workers_of(master.pid());
            now.len() == 2 && now.iter().all(|pid| !members.contains(pid))
        });
        let answer = session.rollback(master.pid());
        assert_eq!(answer.number("revived"), 2, "round {round}: {answer:#?}");
        for _ in 0..10 {
            assert_eq!(get(port).expect("a page"), "a page", "round {round}");
        }
    }
}

/// Two checkpoints with the child and one without it, back and forth.
#[test]
fn several_checkpoints() {
    let mut session = Session::new();
    let mut fixture = Fixture::start("child_memory");
    let pid = fixture.pid().to_string();
    session.will_release(fixture.pid());
    let take = |session: &Session, name: &str| {
        session
            .run(&["checkpoint", "--json", "--pid", &pid, "--name", name])
            .expect(DONE, "checkpoint");
    };
    let back = |session: &Session, name: &str| {
        session
            .run(&[
                "rollback", "--verify", "--json", "--pid", &pid, "--to", name,
            ])
            .expect(DONE, "rollback")
    };
    take(&session, "first");
    fixture.run_on();
    take(&session, "second");
    fixture.mutate();
    take(&session, "without");
    for name in [
        "first", "second", "without", "second", "first", "without", "without", "first", "first",
    ] {
        back(&session, name);
        if name == "without" {
            assert!(fixture.ask(b'v').starts_with("FAIL "), "without the child");
        } else {
            fixture.verify(name);
            fixture.run_on();
        }
    }
    fixture.mutate();
    for (name, revived) in [("second", 1), ("first", 0), ("second", 0)] {
        assert_eq!(back(&session, name).number("revived"), revived, "{name}");
        fixture.verify(name);
    }
    session.release(fixture.pid()).expect(DONE, "release");
    fixture.verify("after the release");
}
