//! Fixture programs of descriptors other than sockets.

use std::process::Command;

use crate::support::fixture::{self, Fixture};
use crate::support::fixture_tests;
use crate::support::session::{REFUSED, Session};

fixture_tests!(
    deleted_file,
    directory_stream,
    epoll,
    epoll_alike,
    epoll_edge,
    epoll_missed_edge,
    eventfd,
    fd_closed_since,
    fd_inherited,
    fd_moved,
    fd_opened_since,
    fd_shared_table,
    fifo,
    file_locks,
    file_offset,
    inotify,
    inotify_removed,
    many_descriptors,
    memfd,
    pidfd,
    pipe_content,
    pipe_ended,
    plain_devices,
    signal_driven,
    signalfd,
    timerfd,
);

/// What can't be recorded: the checkpoint is refused, naming it and its holder, and the program runs on untouched.
#[track_caller]
fn refused_at_checkpoint(program: &str, kind: &str, object: &str) {
    let mut session = Session::new();
    let mut command = Command::new(fixture::build_directory().join(program));
    command.env("KIND", kind);
    let mut fixture = Fixture::launch(program, command);
    for _ in 0..2 {
        let answer = session
            .try_checkpoint(fixture.pid())
            .expect(REFUSED, "checkpoint");
        let refused = &answer.report["refused"];
        let text = |part: &str| refused[part].as_str().unwrap_or_default();
        assert!(text("object").contains(object), "{refused}");
        assert!(
            text("holder").contains(&fixture.pid().to_string()),
            "{refused}"
        );
        assert!(!text("remedy").is_empty(), "{refused}");
        fixture.verify("after a refused checkpoint");
    }
    fixture.mutate();
    assert!(fixture.ask(b'v').starts_with("FAIL "));
}

macro_rules! unsupported {
    ($($kind:ident: $object:literal),* $(,)?) => {
        mod unsupported {$(
            #[test]
            fn $kind() {
                super::refused_at_checkpoint("unsupported", stringify!($kind), $object);
            }
        )*}
    };
}

unsupported!(
    io_uring: "fd 270: io_uring ring",
    userfaultfd: "fd 270: userfaultfd",
    perf_event: "fd 270: perf event",
    fanotify: "fd 270: fanotify",
    mqueue: "fd 270: message queue",
    device: "fd 270: device /dev/loop-control",
    inotify_unread: "fd 270: inotify instance with unread events",
    raw_socket: "fd 270: raw IP socket",
);

#[test]
fn a_thread_with_a_table_of_its_own_is_refused() {
    refused_at_checkpoint("table_unshared", "", "file table of thread");
}

/// What can't be brought back: the rollback is refused, naming it, and nothing is touched.
#[track_caller]
fn refused_at_rollback(program: &str, object: &str) {
    let mut session = Session::new();
    let mut fixture = Fixture::start(program);
    session.checkpoint(fixture.pid());
    session.rollback(fixture.pid());
    fixture.verify("after a rollback that had nothing to do");
    fixture.mutate();
    let wrecked = fixture.ask(b'v');
    assert!(wrecked.starts_with("FAIL "), "{wrecked}");
    let answer = session
        .try_rollback(fixture.pid())
        .expect(REFUSED, "rollback");
    let refused = &answer.report["refused"];
    let text = |part: &str| refused[part].as_str().unwrap_or_default();
    assert!(text("object").contains(object), "{refused}");
    assert!(
        text("holder").contains(&fixture.pid().to_string()),
        "{refused}"
    );
    assert_eq!(
        fixture.ask(b'v'),
        wrecked,
        "a refused rollback changed something"
    );
}

#[test]
fn file_gone() {
    refused_at_rollback("file_gone", "fd 28");
}

#[test]
fn memfd_sealed() {
    refused_at_rollback("memfd_sealed", "was sealed since the checkpoint");
}
