//! Containers made of images.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use snapback::fault;

use crate::containers::bundle;
use crate::support::container::{Containers, unique};
use crate::support::fixture::{Fixture, real};
use crate::support::session::{Answer, DONE, ERROR, REFUSED, Session};
use crate::support::{skip, wait};

/// `run` in the foreground.
fn started(session: &Session, bundle: &Path, id: &str, layer: &[&str]) -> Command {
    let mut command = session.command();
    command.arg("run").args(layer);
    command.arg("--bundle").arg(bundle).arg(id);
    command
}

/// `restore` in the foreground, so that commands and answers pass.
pub(crate) fn restored(
    session: &Session,
    bundle: &Path,
    image: &Path,
    id: &str,
    layer: &[&str],
) -> Command {
    let mut command = session.command();
    command
        .arg("restore")
        .args(layer)
        .arg("--verify")
        .arg("--bundle")
        .arg(bundle);
    command.arg("--image-path").arg(image).arg(id);
    command
}

/// A number that nobody else has: containers of the same program run at the same time, and cgroups are named after them.
pub(crate) fn next() -> usize {
    static CONTAINERS: AtomicUsize = AtomicUsize::new(0);
    CONTAINERS.fetch_add(1, Ordering::Relaxed)
}

/// A fixture program in a container: persisted, changed, killed, restored; it finds all as it was, and is rolled back twice.
#[track_caller]
fn comes_back(program: &str, options: &[&str]) {
    let containers = Containers::new();
    let bundle = bundle(&containers, program, options);
    // An overlay that is mounted outside of a user namespace can't be bound in there.
    let with_files = !options.contains(&"--user-namespace");
    comes_back_in(&containers, program, &bundle, with_files);
}

/// A program of `fixtures/real` in the same way, run by this command line before its path.
#[track_caller]
fn real_comes_back(name: &str, command: &[&str]) {
    if !Path::new(command[0]).exists() {
        skip!("no {}", command[0]);
    }
    for _ in 0..rounds() {
        real_comes_back_once(name, command);
    }
}

/// How often each: `SNAPBACK_ROUNDS`.
fn rounds() -> u32 {
    let rounds = std::env::var("SNAPBACK_ROUNDS").ok();
    rounds.map_or(1, |text| text.parse().expect("a number"))
}

#[track_caller]
fn real_comes_back_once(name: &str, command: &[&str]) {
    let containers = Containers::new();
    let bundle = real_bundle(&containers, name, command);
    comes_back_in(&containers, name, &bundle, true);
}

/// A bundle of a program of `fixtures/real`, run by this command line before its path.
#[track_caller]
pub(crate) fn real_bundle(containers: &Containers, name: &str, command: &[&str]) -> PathBuf {
    let mount = format!("{}:/fixtures:ro", real("").display());
    let path = format!("/fixtures/{name}");
    let fixed = ["host", "--mount", &mount, "--cwd", "/tmp", "--"];
    let all = [&fixed[..], command, &[&path]].concat();
    containers.bundle(name, &all)
}

#[track_caller]
fn comes_back_in(containers: &Containers, program: &str, bundle: &Path, with_files: bool) {
    let (layer, files): (&[&str], &[&str]) = match with_files {
        true => (&["--overlay"], &[]),
        false => (&[], &["--no-files"]),
    };
    let session = &containers.session;
    let image = session.scratch().join("image");
    let path = image.to_str().expect("a path in UTF-8");
    let number = next();
    let id = unique(&format!("persisted-{program}-{number}"));
    let mut fixture = Fixture::launch(program, started(session, bundle, &id, layer));
    fixture.verify("before the checkpoint");
    let run = |arguments: &[&str]| session.run(arguments).expect(DONE, arguments[0]);
    run(&[&["checkpoint"], files, &[&id]].concat());
    fixture.mutate();
    run(&["persist", "--image-path", path, &id]);
    run(&["kill", &id, "KILL"]);
    wait::until("the container has ended", || {
        matches!(fixture.family.child.try_wait(), Ok(Some(_)))
    });

    wait::until("it is gone", || session.run(&["list", "-q"]).out.is_empty());
    containers.wipe();

    let id = unique(&format!("restored-{program}-{number}"));
    let mut fixture = Fixture::take_over(program, restored(session, bundle, &image, &id, layer));
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
}

/// Calls a macro with the names of all fixture programs that can be made of their records alone.
macro_rules! with_restorable {
    ($call:ident) => {
        $call! {
            altstack,
            blocked_io,
            blocked_poll,
            blocked_signals,
            blocked_sleeps,
            blocked_waits,
            brk_grow,
            brk_shrink,
            child_execs,
            child_exits,
            child_family,
            child_memory,
            child_program,
            child_threads,
            children_born,
            comm,
            cow_family,
            cwd,
            deleted_file,
            deleted_file_map,
            directory_stream,
            dirty_pages,
            dontfork,
            ended_connections,
            epoll,
            epoll_alike,
            epoll_edge,
            epoll_missed_edge,
            eventfd,
            fd_closed_since,
            fd_inherited,
            fd_moved,
            fd_opened_since,
            fifo,
            fifo_closed,
            file_deleted_linked,
            file_gone,
            file_locks,
            file_offset,
            file_renamed,
            fs_gs,
            grows_down,
            guard_markers,
            guard_pages,
            hundred_processes,
            hundred_threads,
            itimers,
            jit,
            jit_dual_map,
            kernel_writes,
            madv_dontneed,
            madv_flags,
            madv_shared,
            many_descriptors,
            many_vmas,
            memfd,
            mergeable,
            mlock,
            mlockall_future_only,
            mmap_new,
            mprotect,
            mremap_grow,
            mremap_move,
            munmap,
            oom_and_core,
            orphan_born,
            orphan_datagrams,
            owner_since,
            pending_signals,
            pidfd,
            pipe_content,
            pipe_ended,
            pipe_packet,
            plain_devices,
            posix_timers,
            posix_timers_deleted,
            private_file_dropped,
            private_file_map,
            process_flags,
            process_group,
            process_storm,
            process_title,
            registers,
            remap_same_address,
            rlimit_soft,
            robust_list,
            robust_owner_died,
            rseq,
            rseq_critical,
            session_and_group,
            shared_anon,
            shared_file_map,
            sigaction,
            sigmask,
            signal_driven,
            signalfd,
            sleep_goes_on,
            socket_buffers,
            socket_filter,
            socket_options,
            sparse_terabyte,
            stack_growth,
            sysv_memory,
            tcp_closed,
            tcp_flooded,
            tcp_inside,
            tcp_listener,
            tcp_listener_later,
            tcp_outside,
            tcp_reading_ended,
            tcp_urgent,
            thp,
            thread_exits,
            thread_exits_in_call,
            thread_flags,
            thread_storm,
            threads_born,
            tid_address,
            timer_of_thread,
            timer_overruns,
            timerfd,
            udp,
            udp_corked,
            umask,
            unix_autobind,
            unix_bound_deleted,
            unix_dgram,
            unix_listener,
            unix_listener_inherited,
            unix_seqpacket,
            unix_shared,
            unix_stream_queue,
            wipeonfork,
            xstate,
            zero_pages,
            zero_pages_protected,
            zombie_child,
        }
    };
}
pub(crate) use with_restorable;

/// A test of each of these programs, by a function `comes_back`.
macro_rules! come_back {
    ($($program:ident),+ $(,)?) => {
        $(#[test]
        fn $program() {
            comes_back(stringify!($program), &[]);
        })+
    };
}
pub(crate) use come_back;

/// Tests in every confinement, by a function `comes_back`, and of programs as users run them, by `real_comes_back`.
macro_rules! confined_and_real {
    () => {
        #[test]
        fn confined_by_a_seccomp_profile() {
            crate::containers::PROGRAMS
                .iter()
                .for_each(|program| comes_back(program, &["--seccomp"]));
        }

        #[test]
        fn confined_as_another_user() {
            let options = ["--seccomp", "--user", "1000:1000"];
            crate::containers::PROGRAMS
                .iter()
                .for_each(|program| comes_back(program, &options));
        }

        #[test]
        fn confined_to_a_read_only_root() {
            let options = ["--read-only", "--allow-new-privileges"];
            crate::containers::PROGRAMS
                .iter()
                .for_each(|program| comes_back(program, &options));
        }

        #[test]
        fn confined_to_a_user_namespace() {
            let options = ["--user-namespace", "--user", "1000:1000"];
            crate::containers::PROGRAMS
                .iter()
                .for_each(|program| comes_back(program, &options));
        }

        #[test]
        fn real_python() {
            real_comes_back("bank.py", &["/usr/bin/python3"]);
        }

        #[test]
        fn real_python_pool() {
            real_comes_back("pool.py", &["/usr/bin/python3"]);
        }

        #[test]
        fn real_shell_pipeline() {
            real_comes_back("pipeline.sh", &["/usr/bin/bash"]);
        }

        #[test]
        fn real_node() {
            real_comes_back("bank.js", &["/usr/bin/node"]);
        }

        #[test]
        fn real_java() {
            real_comes_back("Bank.java", &["/usr/bin/java", "-XX:-UsePerfData"]);
        }
    };
}
pub(crate) use confined_and_real;

with_restorable!(come_back);
confined_and_real!();

/// What an image holds that no container can be made with: refused by name, and none is made.
#[track_caller]
fn is_refused(program: &str, object: &str) {
    let mut given = Persisted::of(program);
    let answer = given.restore(&[]);
    let answer = answer.expect(REFUSED, program);
    assert!(answer.err.contains(object), "{answer:#?}");
    given.leaves_nothing();
    given.restore(&["--check"]).expect(REFUSED, program);
}

/// An image of a program, whose container has ended.
struct Persisted {
    containers: Containers,
    bundle: PathBuf,
    image: PathBuf,
    id: String,
}

impl Persisted {
    fn of(program: &str) -> Self {
        let containers = Containers::new();
        let session = &containers.session;
        let bundle = bundle(&containers, program, &[]);
        let image = session.scratch().join("image");
        let id = unique(&format!("image-{program}-{}", next()));
        let mut fixture = Fixture::launch(program, started(session, &bundle, &id, &[]));
        let run = |arguments: &[&str]| session.run(arguments).expect(DONE, arguments[0]);
        run(&["checkpoint", "--no-files", &id]);
        let path = image.to_str().expect("a path in UTF-8");
        run(&["persist", "--image-path", path, &id]);
        run(&["kill", &id, "KILL"]);
        wait::until("the container has ended", || {
            matches!(fixture.family.child.try_wait(), Ok(Some(_)))
        });
        wait::until("it is gone", || session.run(&["list", "-q"]).out.is_empty());
        Self {
            containers,
            bundle,
            image,
            id,
        }
    }

    /// `restore --detach`.
    fn restore(&mut self, more: &[&str]) -> Answer {
        let log = self.containers.session.scratch().join("restore.log");
        let text = |path: &Path| path.to_str().expect("a path in UTF-8").to_owned();
        let (image, bundle) = (text(&self.image), text(&self.bundle));
        let fixed = [
            "restore",
            "--detach",
            "--image-path",
            &image,
            "--bundle",
            &bundle,
        ];
        self.containers
            .run_logged(&log, &[&fixed[..], more, &[&self.id]].concat())
    }

    /// No container, no keeper, no process.
    #[track_caller]
    fn leaves_nothing(&self) {
        self.containers.leave_nothing(&self.id);
    }
}

#[test]
fn what_cannot_be_made_is_refused() {
    is_refused("memory_policy", "memory policy");
    is_refused("inotify", "inotify");
    is_refused("stopped_child", "job control");
    is_refused("thread_credentials", "credentials");
    is_refused("fd_shared_table", "file table");
    is_refused("fifo_deleted", "FIFO");
    is_refused("aio", "AIO context");
}

/// Whatever moment the keeper is killed at, there is no container then, and the image is as good as before.
#[test]
fn a_killed_keeper_leaves_no_container() {
    let points = fault::POINTS.iter();
    for point in points.filter(|point| point.starts_with("restore.")) {
        let mut given = Persisted::of("child_family");
        given.containers.session.set(fault::VARIABLE, point);
        let answer = given.restore(&[]);
        assert_ne!(answer.status, DONE, "{point} was not reached: {answer:#?}");
        given.leaves_nothing();
        given.containers.session.unset(fault::VARIABLE);
        given.restore(&["--verify"]).expect(DONE, point);
    }
}

/// A flipped bit in contents of pages, which are read last: no container, and the message says where it is.
#[test]
fn a_damaged_page_leaves_no_container() {
    let mut given = Persisted::of("dirty_pages");
    let path = given.image.join("memory.img");
    let mut bytes = std::fs::read(&path).expect("reading the image");
    // Late in the file are pages, before the index.
    let at = bytes.len() * 3 / 4;
    bytes[at] ^= 1;
    std::fs::write(&path, &bytes).expect("damaging the image");
    let answer = given.restore(&[]).expect(ERROR, "restore");
    assert!(
        answer.err.contains("memory.img") && answer.err.contains("record"),
        "{answer:#?}"
    );
    given.leaves_nothing();
    bytes[at] ^= 1;
    std::fs::write(&path, &bytes).expect("mending the image");
    given.restore(&["--verify"]).expect(DONE, "restore");
}

#[test]
fn bad_input_is_told() {
    let mut given = Persisted::of("brk_grow");
    let session = &given.containers.session;
    let scratch = session.scratch().to_owned();
    let missing = session.run(&["restore", "--image-path", "/nowhere", "x"]);
    assert!(missing.expect(ERROR, "restore").err.contains("/nowhere"));
    let empty = scratch.join("empty");
    std::fs::create_dir(&empty).expect("making a directory");
    let empty = empty.to_str().expect("a path in UTF-8").to_owned();
    let nothing = session.run(&["restore", "--image-path", &empty, "x"]);
    assert!(
        nothing
            .expect(ERROR, "restore")
            .err
            .contains("checkpoint.img")
    );
    given.leaves_nothing();
    given.restore(&["--check"]).expect(DONE, "--check");
    given.leaves_nothing();
    given.restore(&[]).expect(DONE, "restore");
    // The ID is taken now, and what has it stays.
    let taken = given.restore(&[]).expect(ERROR, "restore");
    assert!(taken.err.contains(&given.id), "{taken:#?}");
    given.containers.status(&given.id);
}

#[test]
fn a_fork_runs_beside_the_first() {
    let programs = ["child_family", "dirty_pages", "dontfork", "shared_anon"];
    programs.into_iter().for_each(runs_beside_the_first);
}

/// Two of one checkpoint, side by side: what one does the other does not see, and each is rolled back by itself.
#[track_caller]
fn runs_beside_the_first(program: &str) {
    let containers = Containers::new();
    let session = &containers.session;
    let bundle = bundle(&containers, program, &[]);
    let ids = [1, 2].map(|_| unique(&format!("fork-{program}-{}", next())));
    let layer = ["--overlay"];
    let mut first = Fixture::launch(program, started(session, &bundle, &ids[0], &layer));
    let run = |arguments: &[&str]| session.run(arguments).expect(DONE, arguments[0]);
    run(&["checkpoint", "--name", "earlier", &ids[0]]);
    first.run_on();
    run(&["checkpoint", &ids[0]]);
    first.mutate();
    let mut command = session.command();
    command.args(["fork", "--overlay", "--verify", &ids[0], &ids[1]]);
    let mut second = Fixture::take_over(program, command);
    wait::until("the second container runs", || {
        session.run(&["state", &ids[1]]).out.contains("\"running\"")
    });
    second.verify("in the second");
    for round in 0..2 {
        let (this, that) = match round {
            0 => (&ids[0], &mut second),
            _ => (&ids[1], &mut first),
        };
        run(&["rollback", "--verify", this]);
        that.verify("untouched by a rollback of the other");
        that.run_on();
    }
    second.mutate();
    first.verify("untouched by what the second does");
    run(&["rollback", "--verify", &ids[1]]);
    second.verify("rolled back");
    let left = std::fs::read_dir(session.root().join(".forks")).map(Iterator::count);
    assert_eq!(left.expect("listing"), 0, "the image between them is gone");
    for fixture in [&mut first, &mut second] {
        fixture.send(b"q");
        wait::until("the container has ended", || {
            matches!(fixture.family.child.try_wait(), Ok(Some(_)))
        });
    }
}
