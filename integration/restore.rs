//! Containers made of images.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::containers::{PROGRAMS, bundle};
use crate::support::container::{Containers, unique};
use crate::support::fixture::{Fixture, real};
use crate::support::session::{DONE, Session};
use crate::support::{skip, wait};

/// `run` in the foreground.
fn started(session: &Session, bundle: &Path, id: &str, layer: &[&str]) -> Command {
    let mut command = session.command();
    command.arg("run").args(layer);
    command.arg("--bundle").arg(bundle).arg(id);
    command
}

/// `restore` in the foreground, so that commands and answers pass.
fn restored(session: &Session, bundle: &Path, image: &Path, id: &str, layer: &[&str]) -> Command {
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
    let containers = Containers::new();
    let programs = real("");
    let mount = format!("{}:/fixtures:ro", programs.display());
    let path = format!("/fixtures/{name}");
    let fixed = ["host", "--mount", &mount, "--cwd", "/tmp", "--"];
    let all = [&fixed[..], command, &[&path]].concat();
    let bundle = containers.bundle(name, &all);
    comes_back_in(&containers, name, &bundle, true);
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
    // Containers of the same program run at the same time, and cgroups are named after them.
    static CONTAINERS: AtomicUsize = AtomicUsize::new(0);
    let number = CONTAINERS.fetch_add(1, Ordering::Relaxed);
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

macro_rules! come_back {
    ($($program:ident),+ $(,)?) => {
        $(#[test]
        fn $program() {
            comes_back(stringify!($program), &[]);
        })+
    };
}

come_back! {
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

#[test]
fn confined_by_a_seccomp_profile() {
    PROGRAMS
        .iter()
        .for_each(|program| comes_back(program, &["--seccomp"]));
}

#[test]
fn confined_as_another_user() {
    let options = ["--seccomp", "--user", "1000:1000"];
    PROGRAMS
        .iter()
        .for_each(|program| comes_back(program, &options));
}

#[test]
fn confined_to_a_read_only_root() {
    let options = ["--read-only", "--allow-new-privileges"];
    PROGRAMS
        .iter()
        .for_each(|program| comes_back(program, &options));
}

#[test]
fn confined_to_a_user_namespace() {
    let options = ["--user-namespace", "--user", "1000:1000"];
    PROGRAMS
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
