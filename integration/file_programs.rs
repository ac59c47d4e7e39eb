//! Real programs that keep their state in files, in containers with a layer of their own: files and processes come
//! back as one.

use std::path::{Path, PathBuf};

use crate::runtime::{text, unique};
use crate::support::container::Containers;
use crate::support::fixture::Fixture;
use crate::support::manifest::Manifest;
use crate::support::redis;
use crate::support::session::DONE;
use crate::support::{skip, wait};

/// Mounts of a bundle of the kind `host` that hold files of its own.
pub(crate) const MOUNTS: &[&str] = &["/", "/tmp", "/run", "/dev/shm"];

/// Rollbacks per program; `SNAPBACK_ROUNDS` overrides it.
pub(crate) fn rounds() -> u32 {
    let rounds = std::env::var("SNAPBACK_ROUNDS");
    rounds.ok().and_then(|text| text.parse().ok()).unwrap_or(3)
}

/// The programs of `fixtures/files`, which obey the fixture protocol.
fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/files")
}

/// Wrecked and rolled back again and again; each time all files have to be as they were at the checkpoint, and the
/// program has to think so and to be able to go on.
#[track_caller]
fn comes_back(name: &str, arguments: &[&str]) {
    let containers = Containers::new();
    let session = &containers.session;
    let sources = format!("{}:/fixtures:ro", sources().display());
    let program = format!("/fixtures/{name}");
    let options = [
        "host",
        "--mount",
        &sources,
        "--env",
        "PYTHONDONTWRITEBYTECODE=1",
        "--",
        "python3",
        &program,
    ];
    let bundle = containers.bundle("bundle", &[&options[..], arguments].concat());
    let id = &unique(&format!(
        "{}{}",
        name.trim_end_matches(".py"),
        arguments.concat()
    ));
    let mut command = session.command();
    command.args(["run", "--overlay", "--bundle", text(&bundle), id]);
    let mut fixture = Fixture::launch(name, command);
    let pid = containers.pid(id);

    fixture.verify("before the checkpoint");
    let taken = session.run(&["checkpoint", "--json", id]);
    taken.expect(DONE, "checkpoint");
    let reference = Manifest::of(pid, MOUNTS);
    assert!(reference.len() > 20, "{reference:?}");
    fixture.verify("after the checkpoint");
    for round in 0..rounds() {
        fixture.mutate();
        if round == 0 {
            assert_ne!(Manifest::of(pid, MOUNTS), reference);
            let answer = fixture.ask(b'v');
            assert!(
                answer.starts_with("FAIL "),
                "{name} is not wrecked: {answer}"
            );
        }
        let back = session.run(&["rollback", "--verify", "--json", id]);
        back.expect(DONE, "rollback");
        let when = format!("after rollback {round}");
        Manifest::of(pid, MOUNTS).expect(&reference, &when);
        fixture.verify(&when);
        fixture.run_on();
        fixture.verify("after it ran on");
    }
    session.run(&["release", id]).expect(DONE, "release");
    fixture.verify("after the release");
    fixture.mutate();
}

#[test]
fn sqlite_with_a_log() {
    comes_back("sqlite.py", &["wal"]);
}

#[test]
fn sqlite_with_a_rollback_journal() {
    comes_back("sqlite.py", &["delete"]);
}

#[test]
fn lmdb_with_a_writable_map() {
    comes_back("lightning.py", &[]);
}

#[test]
fn git_in_the_middle_of_a_rebase() {
    comes_back("rebase.py", &[]);
}

#[test]
fn dpkg_in_the_middle_of_an_installation() {
    comes_back("package.py", &[]);
}

#[test]
fn redis_with_its_log_and_again_from_the_files_alone() {
    if !Path::new("/usr/bin/redis-server").exists() {
        skip!("no redis-server");
    }
    let containers = Containers::new();
    let session = &containers.session;
    let options = [
        "redis",
        "--port",
        "0",
        "--",
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
    ];
    let bundle = containers.bundle("bundle", &options);
    let layer = session.scratch().join("layer");
    std::fs::create_dir(&layer).expect("making a directory");
    let overlay = format!("--overlay={}", text(&layer));
    let id = &unique("log");
    let start = || {
        let pid = containers.start_with(&[&overlay], id, &bundle);
        let socket = PathBuf::from(format!("/proc/{pid}/root/run/redis.sock"));
        (pid, redis::Client::wait_for(&socket), socket)
    };
    let (pid, mut client, socket) = start();
    for key in 0..500 {
        client.must(&format!("SET key:{key} value:{key}"));
    }
    let digest = client.must("DEBUG DIGEST");
    session.run(&["checkpoint", id]).expect(DONE, "checkpoint");
    let reference = Manifest::of(pid, &["/", "/dev/shm"]);
    for round in 0..rounds() {
        let mut late = redis::Client::connect(&socket).expect("connecting");
        late.must("FLUSHALL");
        late.must(&format!("SET round {round}"));
        late.must("BGREWRITEAOF");
        wait::until("the log is written anew", || {
            let info = late.must("INFO persistence");
            info.contains("aof_rewrite_in_progress:0") && info.contains("aof_rewrite_scheduled:0")
        });
        session
            .run(&["rollback", "--verify", id])
            .expect(DONE, "rollback");
        let when = format!("after rollback {round}");
        Manifest::of(pid, &["/", "/dev/shm"]).expect(&reference, &when);
        assert_eq!(client.must("DEBUG DIGEST"), digest, "{when}");
    }
    session
        .run(&["delete", "--force", id])
        .expect(DONE, "delete");
    let (_, mut client, _) = start();
    assert_eq!(client.must("DEBUG DIGEST"), digest, "from the files alone");
}
