//! Fixture programs of threads and processes: registers, signals, timers, family.

crate::support::fixture_tests! {
    altstack,
    blocked_io,
    blocked_signals,
    blocked_sleeps,
    blocked_waits,
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
}

/// Threads are made again without a privilege of the program's own.
#[test]
fn thread_exits_unprivileged() {
    crate::support::fixture::unprivileged_run("thread_exits");
}
