//! Containers made of images.

use std::path::Path;
use std::process::Command;

use crate::containers::{bundle, ours};
use crate::support::container::{Containers, unique};
use crate::support::fixture::Fixture;
use crate::support::session::{DONE, Session};
use crate::support::wait;

/// `restore` in the foreground, so that commands and answers pass.
pub(crate) fn restored(session: &Session, bundle: &Path, image: &Path, id: &str) -> Command {
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
}

macro_rules! come_back {
    ($($program:ident),+ $(,)?) => {
        $(#[test]
        fn $program() {
            comes_back(stringify!($program), &[]);
        })+
    };
}

// Those that need a file that they made are with the files (`integration/files.rs`).
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
    deleted_file,
    deleted_file_map,
    dirty_pages,
    dontfork,
    ended_connections,
    epoll,
    epoll_alike,
    epoll_edge,
    epoll_missed_edge,
    eventfd,
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
