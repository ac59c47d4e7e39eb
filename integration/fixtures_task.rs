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
    child_proc_files,
    child_program,
    child_threads,
    child_zombie,
    children_born,
    comm,
    cwd,
    fs_gs,
    host_name,
    hundred_processes,
    hundred_threads,
    itimers,
    memory_policy,
    oom_and_core,
    pending_signals,
    posix_timers,
    posix_timers_deleted,
    process_flags,
    process_storm,
    process_title,
    registers,
    rlimit_soft,
    robust_list,
    robust_owner_died,
    rseq,
    rseq_critical,
    scheduling,
    seccomp_strict,
    sigaction,
    sigmask,
    sleep_goes_on,
    thread_exits,
    thread_exits_in_call,
    thread_flags,
    thread_storm,
    threads_born,
    tid_address,
    time_namespace,
    timer_of_thread,
    timer_overruns,
    umask,
    waits_go_on,
    xstate,
    zombie_child,
}

/// Threads are made again without a privilege of the program's own.
#[test]
fn thread_exits_unprivileged() {
    crate::support::fixture::unprivileged_run("thread_exits");
}

/// The kernel makes calls go on in another way once they were interrupted, by whomever: here by job control.
#[test]
fn calls_that_were_interrupted_before() {
    use nix::sys::signal::{Signal, kill};

    use crate::support::fixture::{Fixture, comes_back};
    use crate::support::{numbers, wait};

    let fixture = Fixture::start("thread_exits_in_call");
    let pid = nix::unistd::Pid::from_raw(fixture.pid());
    kill(pid, Signal::SIGSTOP).expect("SIGSTOP");
    wait::until("it is stopped", || {
        numbers::stat(pid.as_raw()).is_some_and(|stat| stat.state == 'T')
    });
    kill(pid, Signal::SIGCONT).expect("SIGCONT");
    fixture.settle();
    comes_back(fixture);
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

/// Where `/proc` has other numbers than ours.
#[test]
fn child_proc_files_unprivileged() {
    crate::support::fixture::unprivileged_run("child_proc_files");
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
