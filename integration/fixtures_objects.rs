//! Fixture programs of descriptors other than sockets.

use std::os::fd::AsRawFd;
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::support::fixture::{self, Fixture};
use crate::support::fixture_tests;
use crate::support::session::{REFUSED, Session};

fixture_tests!(
    aio,
    chrooted,
    console,
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
    fifo_closed,
    fifo_deleted,
    file_deleted_linked,
    file_gone,
    file_locks,
    file_offset,
    file_renamed,
    inotify,
    inotify_removed,
    leases,
    many_descriptors,
    memfd,
    mounts,
    owner_since,
    pidfd,
    pipe_content,
    pipe_ended,
    pipe_packet,
    plain_devices,
    proc_files,
    pty_closed,
    pty_content,
    pty_foreground,
    pty_settings,
    signal_driven,
    signalfd,
    sysv_messages,
    sysv_semaphores,
    timerfd,
);

/// In the IPC namespace of the machine those are the tree's that it used last.
#[test]
fn system_v_objects_of_the_machine() {
    for (program, remove) in [("sysv_messages", "-Q"), ("sysv_semaphores", "-S")] {
        let mut command = Command::new(fixture::build_directory().join(program));
        command.env("HOST_IPC", "1");
        let mut session = Session::new();
        let mut fixture = Fixture::launch(program, command);
        session.checkpoint(fixture.pid());
        for _ in 0..2 {
            fixture.mutate();
            session.rollback(fixture.pid());
            fixture.verify("after a rollback");
            fixture.run_on();
        }
        let mut removal = Command::new("ipcrm");
        let key = fixture.pid().to_string();
        assert!(
            removal
                .args([remove, &key])
                .status()
                .expect("ipcrm")
                .success()
        );
    }
}

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
    bpf: "fd 270: bpf-map",
    fanotify: "fd 270: fanotify",
    mqueue: "fd 270: message queue",
    device: "fd 270: device /dev/loop-control",
    inotify_unread: "fd 270: inotify instance with unread events",
);

#[test]
fn events_of_aio_that_wait_are_refused() {
    refused_at_checkpoint("aio_unread", "", "AIO context with events");
}

#[test]
fn an_epoll_entry_without_its_number_is_refused() {
    let object = "fd 90: epoll entry for fd 91";
    refused_at_checkpoint("epoll_closed_target", "", object);
}

/// With its mount point a mount goes from all namespaces: nothing that the tree has done.
#[test]
fn a_mount_that_the_machine_takes_away_is_not_missed() {
    let mut session = Session::new();
    let point = session.scratch().join("mounted");
    std::fs::create_dir(&point).expect("making a directory");
    let tmpfs = Some("tmpfs");
    mount(tmpfs, &point, tmpfs, MsFlags::empty(), None::<&str>).expect("mounting a tmpfs");
    let mut command = Command::new("unshare");
    let program = fixture::build_directory().join("umask");
    command.args(["--mount", "--propagation", "private"]);
    command.arg(program);
    let mut fixture = Fixture::launch("umask", command);
    session.checkpoint(fixture.pid());
    umount2(&point, MntFlags::MNT_DETACH).expect("unmounting it");
    let is_mounted = |pid: i32| {
        let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        mounts.contains(point.to_str().unwrap())
    };
    assert!(is_mounted(fixture.pid()), "the namespace is its own");
    std::fs::remove_dir(&point).expect("removing the mount point");
    assert!(!is_mounted(fixture.pid()), "it has gone everywhere");
    for _ in 0..2 {
        fixture.mutate();
        session.rollback(fixture.pid());
        fixture.verify("after a rollback");
        fixture.run_on();
    }
}

#[test]
fn a_thread_with_a_table_of_its_own_is_refused() {
    refused_at_checkpoint("table_unshared", "", "file table of thread");
}

#[test]
fn a_debugger_inside_is_refused() {
    let mut session = Session::new();
    let mut fixture = Fixture::start("tracer_inside");
    let answer = session
        .try_checkpoint(fixture.pid())
        .expect(REFUSED, "checkpoint");
    let remedy = answer.report["refused"]["remedy"].as_str();
    let tracer = format!("it is traced by pid {}", fixture.pid());
    assert!(
        remedy.is_some_and(|text| text.starts_with(&tracer)),
        "{answer:#?}"
    );
    fixture.verify("after a refused checkpoint");
}

/// A terminal whose master is outside: its settings come back, its window size and what was typed are the user's.
#[test]
fn console_from_outside() {
    let pair = nix::pty::openpty(None, None).expect("openpty");
    let path = nix::unistd::ttyname(&pair.slave).expect("ttyname");
    for end in [&pair.master, &pair.slave] {
        let own = FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC);
        fcntl(end.as_raw_fd(), own).expect("F_SETFD");
    }
    let mut command = Command::new(fixture::build_directory().join("console"));
    command.env("TTY", &path);
    let mut session = Session::new();
    let mut fixture = Fixture::launch("console", command);
    session.checkpoint(fixture.pid());
    let mut outside = std::fs::File::from(pair.master);
    for _ in 0..2 {
        fixture.mutate();
        snapback::kernel::tty::set_window_size(&outside, &[10, 20, 0, 0]).expect("TIOCSWINSZ");
        std::io::Write::write_all(&mut outside, b"typed").expect("write");
        session.rollback(fixture.pid());
        fixture.verify("after a rollback");
        let now = snapback::kernel::tty::window_size(&outside).expect("TIOCGWINSZ");
        assert_eq!(now, [10, 20, 0, 0]);
        fixture.run_on();
    }
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
fn cwd_removed() {
    refused_at_rollback("cwd_removed", "its working directory");
}

#[test]
fn pidfd_dead() {
    refused_at_rollback("pidfd_dead", "fd 95: anon_inode:[pidfd]");
}

#[test]
fn memfd_sealed() {
    refused_at_rollback("memfd_sealed", "was sealed since the checkpoint");
}
