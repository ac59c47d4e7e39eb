//! State that is hard or impossible to undo: it comes back, or it is refused by name and nothing is touched, or the program
//! is dead and the answer says so. What it never is: reported as rolled back and wrong.

use crate::support::fixture::{self, Fixture};
use crate::support::session::{DONE, LOST, REFUSED, Session};
use crate::support::{numbers, wait};

#[track_caller]
fn assert_refused(answer: &crate::support::session::Answer) {
    assert_eq!(answer.text("outcome"), "refused", "{answer:#?}");
    for part in ["object", "holder", "remedy"] {
        let text = answer.report["refused"][part].as_str().unwrap_or_default();
        assert!(!text.is_empty(), "a refusal without {part}: {answer:#?}");
    }
}

#[track_caller]
fn honest_run(program: &str) {
    let mut session = Session::new();
    let mut fixture = Fixture::start(program);
    let answer = session.try_checkpoint(fixture.pid());
    if answer.status != DONE {
        assert_eq!(answer.status, REFUSED, "{answer:#?}");
        assert_refused(&answer);
        fixture.verify("after a refused checkpoint");
        return;
    }
    session.rollback(fixture.pid());
    fixture.verify("after a rollback that had nothing to do");
    fixture.mutate();
    let wrecked = fixture.ask(b'v');
    let answer = session.try_rollback(fixture.pid());
    match answer.status {
        DONE => fixture.verify("after the rollback"),
        REFUSED => {
            assert_refused(&answer);
            assert_eq!(
                fixture.ask(b'v'),
                wrecked,
                "a refused rollback changed something"
            );
        }
        LOST => wait::until("what is lost has ended", || {
            !numbers::is_alive(fixture.pid())
        }),
        _ => panic!("{answer:#?}"),
    }
}

macro_rules! honesty_tests {
    ($($program:ident),* $(,)?) => {$(
        mod $program {
            #[test]
            fn notices_what_is_wrecked() {
                super::fixture::control_run(stringify!($program));
            }

            #[test]
            fn is_never_wrong() {
                super::honest_run(stringify!($program));
            }
        }
    )*};
}

honesty_tests! {
    call_dispatch,
    capability_sets,
    cgroup_left,
    clone_vm,
    credentials,
    deny_write_execute,
    effective_ids,
    hard_limits,
    hugetlb,
    local_descriptors,
    login_uid,
    namespaces,
    no_new_privileges,
    process_group,
    root_directory,
    sealed_memory,
    sealed_since,
    seccomp_filter,
    seccomp_of_thread,
    secure_bits,
    session_and_group,
    shared_file_map,
    stopped_child,
    sysv_removed,
    sysv_unattached,
    thread_credentials,
    vdso_moved,
    vfork_waits,
}

/// A file that a process outside has the same description of, and writes to: what was written to it stays, and nobody writes over it.
#[test]
fn a_log_that_is_shared_with_the_outside_is_not_written_over() {
    use std::io::Write;
    use std::process::{Command, Stdio};

    let path = tempfile::NamedTempFile::new()
        .expect("a file")
        .into_temp_path();
    let mut log = std::fs::File::create(&path).expect("a log");
    let shared = log.try_clone().expect("its description");
    let mut cat = Command::new("cat");
    let cat = cat.stdin(Stdio::piped()).stdout(shared).spawn();
    let mut cat = cat.expect("starting cat");
    let mut input = cat.stdin.take().expect("a pipe");
    let holds = |expected: &str| {
        let is = || std::fs::read_to_string(&path).expect("reading the log");
        wait::until("cat has written", || is().len() >= expected.len());
        assert_eq!(is(), expected);
    };
    input.write_all(b"one\n").expect("writing to cat");
    holds("one\n");
    let mut session = Session::new();
    let pid = cat.id() as i32;
    session.checkpoint(pid);
    for (after, outside) in [("one\ntwo\n", ""), ("one\ntwo\ntwo\n", "again\n")] {
        input.write_all(b"two\n").expect("writing to cat");
        holds(after);
        log.write_all(outside.as_bytes())
            .expect("writing to the log");
        session.rollback(pid);
    }
    input.write_all(b"three\n").expect("writing to cat");
    holds("one\ntwo\ntwo\nagain\nthree\n");
    session.release(pid).expect(DONE, "release");
    drop(input);
    assert!(cat.wait().expect("waiting for cat").success());
}
