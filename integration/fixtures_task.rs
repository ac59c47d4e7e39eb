//! Fixture programs of threads and processes: registers, signals, timers, family.

crate::support::fixture_tests! {
    altstack,
    blocked_io,
    blocked_poll,
    blocked_signals,
    blocked_sleeps,
    blocked_waits,
    child_execs,
    child_exits,
    child_family,
    child_had_left,
    child_leaves,
    child_memory,
    child_program,
    child_threads,
    child_zombie,
    children_born,
    comm,
    cwd,
    fs_gs,
    hundred_processes,
    hundred_threads,
    itimers,
    pending_signals,
    posix_timers,
    posix_timers_deleted,
    process_storm,
    registers,
    rlimit_soft,
    robust_list,
    rseq,
    rseq_critical,
    scheduling,
    sigaction,
    sigmask,
    threads_born,
    thread_exits,
    thread_storm,
    tid_address,
    umask,
    xstate,
    zombie_child,
}

/// Threads are made again without a privilege of the program's own.
#[test]
fn thread_exits_unprivileged() {
    crate::support::fixture::unprivileged_run("thread_exits");
}

/// Processes are made again without a privilege of the program's own, under numbers that are others outside.
#[test]
fn child_exits_unprivileged() {
    crate::support::fixture::unprivileged_run("child_exits");
}

#[test]
fn child_threads_unprivileged() {
    crate::support::fixture::unprivileged_run("child_threads");
}

#[test]
fn child_family_unprivileged() {
    crate::support::fixture::unprivileged_run("child_family");
}

#[test]
fn child_memory_unprivileged() {
    crate::support::fixture::unprivileged_run("child_memory");
}

/// Where it may not tell the kernel what program it is, it executes it.
#[test]
fn child_program_unprivileged() {
    crate::support::fixture::unprivileged_run("child_program");
}

#[test]
fn child_execs_unprivileged() {
    crate::support::fixture::unprivileged_run("child_execs");
}

#[test]
fn zombie_child_unprivileged() {
    crate::support::fixture::unprivileged_run("zombie_child");
}
