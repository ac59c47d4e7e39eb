//! Process trees that have ended, root and all.

use std::fs::File;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snapback::fault;

use crate::support::family::Family;
use crate::support::fixture::{Fixture, below_reaper, build_directory, real};
use crate::support::redis::{self, Client};
use crate::support::session::{DONE, ERROR, REFUSED, Session};
use crate::support::{numbers, skip, wait};

/// Who turns back the kernel's count of numbers (`ns_last_pid`) has others get those that were free for us a moment ago.
static NUMBERS: RwLock<()> = RwLock::new(());

fn numbers_go_on() -> RwLockReadGuard<'static, ()> {
    NUMBERS.read().unwrap_or_else(PoisonError::into_inner)
}

fn numbers_turn_back() -> RwLockWriteGuard<'static, ()> {
    NUMBERS.write().unwrap_or_else(PoisonError::into_inner)
}

/// Kills a tree, all of it or its root alone. Nobody has reaped the root yet.
fn end_unreaped(family: &Family, signal: Signal, all: bool) {
    let root = family.pid();
    // What is traced between operations is a shadow.
    let is_shadow = |pid| numbers::status_number(pid, "TracerPid").unwrap_or(0) != 0;
    let mut members = family.members();
    members.retain(|pid| *pid == root || all && !is_shadow(*pid));
    for pid in members {
        // It may have ended with another.
        let _ = kill(Pid::from_raw(pid), signal);
    }
    wait::until("the root has ended", || !numbers::is_alive(root));
}

/// The same, and the root is reaped.
#[track_caller]
fn end(family: &Family, signal: Signal, all: bool) {
    end_unreaped(family, signal, all);
    wait::until("the root is reaped", || {
        numbers::stat(family.pid()).is_none()
    });
}

fn start(program: &str) -> Fixture {
    let command = below_reaper(build_directory().join(program));
    Fixture::launch_below_reaper(program, command)
}

/// The mounts of a tree that has ended are those that its shadow has, and files go back with it.
#[test]
fn files_of_a_root_that_has_ended_go_back() {
    let _numbers = numbers_go_on();
    // A root of its own, which is a tmpfs.
    let script = "mount -t tmpfs none /mnt; cd /mnt; mkdir usr proc fixtures old; ln -s usr/bin usr/lib usr/lib64 .; \
                  mount --bind /usr usr; mount --rbind /proc proc; mount --bind \"$0\" fixtures; pivot_root . old; \
                  umount -l /old; exec /fixtures/brk_grow";
    let mut command = below_reaper("unshare");
    command.args(["--mount", "sh", "-e", "-c", script]);
    command.arg(build_directory());
    let mut fixture = Fixture::launch_below_reaper("brk_grow", command);
    let mut session = Session::new();
    let file = |pid: i32| format!("/proc/{pid}/root/file");
    let write = |pid: i32, text: &str| std::fs::write(file(pid), text).expect("writing a file");
    write(fixture.pid(), "before");
    session.will_release(fixture.pid());
    let pid = fixture.pid().to_string();
    let taken = session.run(&["checkpoint", "--json", "--pid", &pid]);
    let taken = taken.expect(DONE, "checkpoint");
    assert_eq!(taken.report["files"]["included"][0], "/", "{taken:#?}");
    for round in 0..2 {
        fixture.mutate();
        write(fixture.pid(), "after");
        end(&fixture.family, Signal::SIGKILL, true);
        session.rollback(fixture.pid());
        let text = std::fs::read_to_string(file(fixture.pid())).expect("reading a file");
        assert_eq!(text, "before", "{round}");
        fixture.verify("made again");
    }
    session.release(fixture.pid()).expect(DONE, "release");
}

/// Killed again and again, and kept again when it has come back.
#[track_caller]
fn comes_back(mut fixture: Fixture) {
    let mut session = Session::new();
    let pid = fixture.pid();
    session.checkpoint(pid);
    end(&fixture.family, Signal::SIGKILL, true);
    let answer = session.rollback(pid);
    assert!(answer.number("revived") >= 1, "{answer:#?}");
    fixture.verify("after all was killed");
    fixture.run_on();
    fixture.verify("after it ran on");
    session.rollback(pid);
    fixture.verify("rolled back while it lives");

    end(&fixture.family, Signal::SIGKILL, false);
    session.rollback(pid);
    fixture.verify("after its root was ended");

    let second = ["--json", "--pid", &pid.to_string()];
    let second = |verb, name: &[&'static str]| [&[verb], name, &second[..]].concat();
    let taken = session.run(&second("checkpoint", &["--name", "second"]));
    taken.expect(DONE, "checkpoint");
    fixture.mutate();
    end(&fixture.family, Signal::SIGKILL, true);
    for name in ["second", "default", "second"] {
        let back = session.run(&second("rollback", &["--verify", "--to", name]));
        back.expect(DONE, "rollback");
        fixture.verify(name);
        end(&fixture.family, Signal::SIGKILL, true);
    }
    session.rollback(pid);
    session.release(pid).expect(DONE, "release");
    fixture.verify("after the release");
}

macro_rules! ended_tests {
    ($($program:ident),* $(,)?) => {$(
        #[test]
        fn $program() {
            let _numbers = super::numbers_go_on();
            super::comes_back(super::start(stringify!($program)));
        }
    )*};
}

mod programs {
    ended_tests! {
        blocked_waits,
        child_family,
        child_program,
        child_threads,
        cow_family,
        credentials,
        deleted_file,
        dirty_pages,
        dontfork,
        epoll,
        fifo,
        file_locks,
        hundred_processes,
        hundred_threads,
        itimers,
        many_vmas,
        memfd,
        mlock,
        no_new_privileges,
        pending_signals,
        pipe_content,
        posix_timers,
        private_file_map,
        process_title,
        registers,
        rlimit_soft,
        rseq,
        scheduling,
        seccomp_filter,
        shared_anon,
        sigaction,
        tcp_inside,
        tcp_listener,
        timerfd,
        unix_bound_deleted,
        unix_listener,
        unix_stream_queue,
        wipeonfork,
        xstate,
        zombie_child,
    }
}

/// Its root does not get its number by a privilege of its own.
#[test]
fn without_privileges() {
    let _numbers = numbers_turn_back();
    let mut command = below_reaper("setpriv");
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .args(["--bounding-set=-all", "--no-new-privs"])
        .arg(build_directory().join("child_family"));
    comes_back(Fixture::launch_below_reaper("child_family", command));
}

/// A root that leads a session of its own, and one in the process group of others.
#[test]
fn group_and_session() {
    let _numbers = numbers_go_on();
    let of_others = r#"exec 3<&0; "$0" <&3 3<&- & wait; exec sleep 1000"#;
    for how in [&["setsid", "--wait"][..], &["sh", "-c", of_others]] {
        let mut command = below_reaper(how[0]);
        command
            .args(&how[1..])
            .arg(build_directory().join("dirty_pages"));
        let mut fixture = Fixture::launch_below_reaper("dirty_pages", command);
        let mut all = numbers::processes().into_iter();
        let root = all.find(|(_, stat)| stat.parent == fixture.pid());
        let root = root.expect("its child").0;
        let place = || {
            let group = numbers::stat(root).expect("it lives").group;
            let session = nix::unistd::getsid(Some(Pid::from_raw(root)));
            (group, session.expect("it lives").as_raw())
        };
        let was = place();
        let mut session = Session::new();
        session.checkpoint(root);
        let kill_root = || {
            kill(Pid::from_raw(root), Signal::SIGKILL).expect("killing");
            wait::until("the root is reaped", || numbers::stat(root).is_none());
        };
        for round in 0..3 {
            kill_root();
            session.rollback(root);
            assert_eq!(place(), was, "{how:?}");
            fixture.verify(&format!("{how:?}, round {round}"));
        }
        session.release(root).expect(DONE, "release");
        kill_root();
    }
}

/// A pipeline, and a pool of workers.
#[test]
fn scripts() {
    let _numbers = numbers_go_on();
    for (shell, name) in [("bash", "pipeline.sh"), ("python3", "pool.py")] {
        let mut command = below_reaper(shell);
        command.arg(real(name));
        let mut fixture = Fixture::launch_below_reaper(name, command);
        let mut session = Session::new();
        session.checkpoint(fixture.pid());
        for round in 0..5 {
            end(&fixture.family, Signal::SIGKILL, true);
            session.rollback(fixture.pid());
            fixture.verify(&format!("round {round}"));
            fixture.run_on();
        }
    }
}

/// Redis: its digest, its clients' ways to it, and what it does on.
#[test]
fn redis() {
    let _numbers = numbers_go_on();
    if !Path::new("/usr/bin/redis-server").exists() {
        skip!("no redis-server");
    }
    let directory = tempfile::tempdir().expect("making a directory");
    let socket = directory.path().join("redis.sock");
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = free.local_addr().expect("an address").port();
    drop(free);
    let log = File::create(directory.path().join("log")).expect("making a file");
    let command = redis::server(&socket);
    let server = Family::start_below_reaper(
        below_reaper(command.get_program())
            .args(command.get_args())
            .args(["--port", &port.to_string()])
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("duplicating"))
            .stderr(log),
    );
    let digest = redis::fill(&mut Client::wait_for(&socket));
    let mut session = Session::new();
    session.checkpoint(server.pid());
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGKILL] {
        let mut client = Client::wait_for(&socket);
        client.must("FLUSHALL");
        end(&server, signal, true);
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
        session.rollback(server.pid());
        TcpStream::connect(("127.0.0.1", port)).expect("it listens on its port");
        let mut client = Client::wait_for(&socket);
        assert_eq!(client.must("DEBUG DIGEST"), digest, "after {signal}");
        client.must("SET more x");
    }
}

/// What the command says of a tree that has ended.
#[test]
fn ended_trees_are_kept_until_they_are_released() {
    let _numbers = numbers_go_on();
    let mut fixture = Fixture::start("dirty_pages");
    let mut session = Session::new();
    let pid = fixture.pid();
    let target = ["--pid", &pid.to_string()];
    let ask = |session: &Session, verb| session.run(&[&[verb][..], &target[..]].concat());
    session.checkpoint(pid);
    end_unreaped(&fixture.family, Signal::SIGKILL, true);
    let answer = session.try_rollback(pid).expect(REFUSED, "rollback");
    assert!(
        answer.text("error").contains("has not reaped it"),
        "{answer:#?}"
    );
    fixture.family.child.wait().expect("reaping");

    let answer = ask(&session, "checkpoint").expect(ERROR, "checkpoint");
    assert!(answer.err.contains("snapback rollback"), "{answer:#?}");
    let answer = ask(&session, "checkpoints").expect(DONE, "checkpoints");
    assert!(answer.out.contains("default"), "{answer:#?}");
    session.rollback(pid);
    fixture.verify("after the rollback");
    // It goes by its new start time now.
    ask(&session, "checkpoint").expect(DONE, "checkpoint");
    assert_eq!(session.keepers().len(), 1);

    end_unreaped(&fixture.family, Signal::SIGKILL, true);
    assert_eq!(session.keepers().len(), 1);
    session.release(pid).expect(DONE, "release");
    wait::until("the keeper has ended", || session.keepers().is_empty());
    ask(&session, "rollback").expect(ERROR, "rollback");
}

/// Another process has the number now.
#[test]
fn a_taken_number_is_named() {
    let _numbers = numbers_turn_back();
    let mut fixture = start("dirty_pages");
    let mut session = Session::new();
    let pid = fixture.pid();
    session.checkpoint(pid);
    end(&fixture.family, Signal::SIGKILL, true);
    let mut taker = None;
    wait::until("another has its number", || {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).expect("root");
        let family = Family::start(Command::new("sleep").arg("1000"));
        taker = (family.pid() == pid).then_some(family);
        taker.is_some()
    });
    let answer = session.try_rollback(pid).expect(REFUSED, "rollback");
    assert!(
        answer.text("error").contains("(sleep) has its number now"),
        "{answer:#?}"
    );
    drop(taker);
    session.rollback(pid);
    fixture.verify("after the rollback");
}

/// A root that lives is not killed to be made again.
#[test]
fn a_living_root_is_left_to_its_parent() {
    let mut fixture = Fixture::start("no_new_privileges");
    let mut session = Session::new();
    session.checkpoint(fixture.pid());
    fixture.mutate();
    let answer = session.try_rollback(fixture.pid());
    let answer = answer.expect(REFUSED, "rollback");
    assert!(
        answer.text("error").contains("its parent would be told"),
        "{answer:#?}"
    );
}

/// The keeper is killed while it makes a tree again: that is gone, or as it was at the checkpoint.
#[test]
fn a_killed_keeper_leaves_nothing_half_way() {
    let _numbers = numbers_go_on();
    let points = fault::POINTS.iter();
    for point in
        points.filter(|point| point.starts_with("rollback.") || point.starts_with("remake."))
    {
        println!("{point}");
        let mut session = Session::new();
        let mut fixture = start("child_threads");
        session.set(fault::VARIABLE, point);
        session.checkpoint(fixture.pid());
        end(&fixture.family, Signal::SIGKILL, true);
        let answer = session.try_rollback(fixture.pid());
        assert_ne!(answer.status, DONE, "{point} was not reached: {answer:#?}");
        wait::until("the keeper is gone", || session.keepers().is_empty());
        let traced = |pid| numbers::status_number(pid, "TracerPid").unwrap_or(0) != 0;
        wait::until("nobody is traced", || {
            !fixture.family.members().into_iter().any(traced)
        });
        // It may be dying.
        let is_alive = numbers::is_alive(fixture.pid());
        let answer = is_alive.then(|| fixture.ask_if_alive(b'v')).flatten();
        match answer {
            Some(answer) => assert_eq!(answer, "PASS", "{point}"),
            None => wait::until(&format!("{point}: none of the tree lives"), || {
                fixture.family.members().is_empty()
            }),
        }
    }
}
