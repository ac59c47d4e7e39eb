//! Puts back what differs from the record.

use std::collections::BTreeSet;

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::IntoBytes;

use crate::freeze::{Arg, Batch, Stopped};
use crate::kernel::host_names::{self, NOBODYS};
use crate::kernel::ptrace::{self, Queue, RseqConfiguration, SignalInfo};
use crate::kernel::scheduling;

use super::ask::XSTATE_ROOM;
use super::check::{Observed, path_input};
use super::layout::{
    Action, INTERVAL_TIMERS, LIMITS, MemoryPolicy, SIGNALS, ThreadRecord, ThreadState,
};
use super::pending::{self, For};
use super::probe::ProcessProbe;
use super::recorded::{Recorded, RecordedProcess, RecordedThread};
use super::steps::{RSEQ_REGISTER, RSEQ_UNREGISTER, Steps};
use super::{About, Error, Result, posix_timers, probe};

/// Undoes what would be in the way of memory and descriptors: resource limits set since, and rseq areas registered since,
/// which must not be unmapped while the kernel writes to them.
pub fn loosen(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded<'_>,
    observed: &Observed,
) -> Result<()> {
    for process in recorded.processes() {
        let pid = process.pid();
        if let Some(live) = observed.processes.get(&pid) {
            let mut steps = Steps::new(pid);
            loosen_limits(&mut steps, process, live);
            steps.run(stopped, pid)?;
        }
        for (tid, thread) in &process.threads {
            let live = ptrace::rseq(*tid).about(*tid, "rseq configuration")?;
            if live.address != 0 && !has_rseq(thread.record, &live) {
                let mut steps = Steps::new(*tid);
                steps.rseq(live.address, live.size, RSEQ_UNREGISTER, live.signature);
                steps.run(stopped, pid)?;
            }
        }
    }
    Ok(())
}

/// Makes every recorded process and thread as recorded, once memory and descriptors are, and everything born since has
/// ended. Registers and masks are those that the threads run on with ([`Thread::settle`](crate::freeze::Thread::settle)).
pub fn restore(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded<'_>,
    observed: &Observed,
) -> Result<()> {
    for process in recorded.processes() {
        let Some(live) = observed.processes.get(&process.pid()) else {
            continue; // a zombie
        };
        restore_process(stopped, process, live, &observed.revived)?;
        for (tid, thread) in &process.threads {
            let Some(state) = observed.threads.get(tid) else {
                continue;
            };
            restore_thread(stopped, process, thread, state)?;
        }
        restore_pending(stopped, process)?;
        for thread in process.threads.values() {
            restore_registers(stopped, process.pid(), thread)?;
        }
    }
    Ok(())
}

fn has_rseq(recorded: &ThreadRecord, live: &RseqConfiguration) -> bool {
    (live.address, live.size, live.signature)
        == (
            recorded.rseq_address,
            recorded.rseq_size,
            recorded.rseq_signature,
        )
}

/// Soft limits that were lowered since; those that were raised stay so until all is back.
fn loosen_limits(steps: &mut Steps, process: &RecordedProcess<'_>, live: &ProcessProbe) {
    let limits = process.record.state.limits.iter().zip(&live.state.limits);
    for (limit, ([was, _], [is, hard])) in limits.enumerate() {
        if is < was {
            let value = steps.batch.input([*was, *hard].as_bytes());
            let arguments = [0.into(), limit.into(), value, 0.into()];
            steps.call("prlimit64", libc::SYS_prlimit64, &arguments);
        }
    }
}

fn restore_limits(steps: &mut Steps, process: &RecordedProcess<'_>, live: &ProcessProbe) {
    let was = &process.record.state.limits;
    for limit in (0..LIMITS).filter(|&limit| was[limit] != live.state.limits[limit]) {
        let value = steps.batch.input(was[limit].as_bytes());
        let arguments = [0.into(), limit.into(), value, 0.into()];
        steps.call("prlimit64", libc::SYS_prlimit64, &arguments);
    }
}

/// Process-wide state, by the leader: the signals that wait are taken first, since setting a signal to be ignored drops
/// them and setting timers can queue new ones.
fn restore_process(
    stopped: &mut Stopped<'_>,
    process: &RecordedProcess<'_>,
    live: &ProcessProbe,
    revived: &BTreeSet<Pid>,
) -> Result<()> {
    let pid = process.pid();
    let was = &process.record.state;
    let mut steps = Steps::new(pid);
    take_pending(stopped, process, &mut steps.batch)?;
    restore_limits(&mut steps, process, live);
    restore_actions(&mut steps, process.actions, &live.actions);
    restore_timers(&mut steps, process, live, revived)?;
    if was.umask != live.state.umask {
        steps.call("umask", libc::SYS_umask, &[was.umask.into()]);
    }
    if was.directory != live.state.directory {
        let path = path_input(&mut steps.batch, process.directory);
        steps.call("chdir", libc::SYS_chdir, &[path]);
    }
    if was.dumpable != live.state.dumpable {
        let value = was.dumpable.into();
        steps.prctl("prctl PR_SET_DUMPABLE", libc::PR_SET_DUMPABLE, value);
    }
    if was.subreaper != live.state.subreaper {
        let value = was.subreaper.into();
        let what = "prctl PR_SET_CHILD_SUBREAPER";
        steps.prctl(what, libc::PR_SET_CHILD_SUBREAPER, value);
    }
    if was.huge_pages_disabled != live.state.huge_pages_disabled {
        // What is read is the first argument and, since Linux 6.18, the flags in the second.
        let disabled = was.huge_pages_disabled;
        let [on, flags] = [disabled & 1, disabled & !1].map(Arg::from);
        let arguments = [
            libc::PR_SET_THP_DISABLE.into(),
            on,
            flags,
            0.into(),
            0.into(),
        ];
        steps.call("prctl PR_SET_THP_DISABLE", libc::SYS_prctl, &arguments);
    }
    if was.merges_memory != live.state.merges_memory {
        let value = was.merges_memory.into();
        steps.prctl("prctl PR_SET_MEMORY_MERGE", PR_SET_MEMORY_MERGE, value);
    }
    if was.personality != live.state.personality {
        let value = was.personality.into();
        steps.call("personality", libc::SYS_personality, &[value]);
    }
    steps.run(stopped, pid)?;
    let settings = &process.record.settings;
    settings.restore(stopped, pid, &live.settings)?;
    let names = &was.host_names;
    if *names != NOBODYS && *names != live.state.host_names {
        host_names::set(pid, names).about(pid, "setting the name of the host")?;
    }
    Ok(())
}

/// Linux 6.4.
const PR_SET_MEMORY_MERGE: i32 = 67;

/// Takes all that waits for the process, if it is not what is recorded. The leader's own signals come out first, so those
/// are taken too; they are queued again with the rest.
fn take_pending(
    stopped: &mut Stopped<'_>,
    process: &RecordedProcess<'_>,
    batch: &mut Batch,
) -> Result<()> {
    /// For what comes in from outside meanwhile.
    const SPARE: usize = 4;
    let pid = process.pid();
    take_excess(stopped, pid, pid, Queue::Shared)?;
    let shared = pending_signals(pid, Queue::Shared)?;
    if shared != process.pending {
        let own = pending_signals(pid, Queue::Private)?;
        pending::take(batch, pending::set(&own), own.len());
        pending::take(batch, u64::MAX, shared.len() + SPARE);
    }
    Ok(())
}

fn pending_signals(tid: Pid, queue: Queue) -> Result<Vec<SignalInfo>> {
    ptrace::pending_signals(tid, queue).about(tid, "pending signals")
}

/// Takes signals until one batch has room for the rest.
fn take_excess(stopped: &mut Stopped<'_>, pid: Pid, tid: Pid, queue: Queue) -> Result<()> {
    loop {
        let waiting = pending_signals(tid, queue)?;
        if waiting.len() <= pending::MOST {
            return Ok(());
        }
        let mut batch = Batch::new();
        pending::take(&mut batch, pending::set(&waiting), pending::MOST);
        stopped.run_on(pid, tid, &batch)?;
    }
}

fn restore_actions(steps: &mut Steps, recorded: &[Action], live: &[Action; SIGNALS]) {
    for (index, (was, is)) in recorded.iter().zip(live).enumerate() {
        if was == is {
            continue;
        }
        let action = steps.batch.input(was.as_bytes());
        let arguments = [(index + 1).into(), action, 0.into(), 8.into()];
        steps.call("rt_sigaction", libc::SYS_rt_sigaction, &arguments);
    }
}

/// Timers that run get back the time that was left; others are left alone if they did not run either. One for a thread that
/// was made again is made again too: it means the one that has ended, though that had the same number.
fn restore_timers(
    steps: &mut Steps,
    process: &RecordedProcess<'_>,
    live: &ProcessProbe,
    revived: &BTreeSet<Pid>,
) -> Result<()> {
    for timer in 0..INTERVAL_TIMERS {
        let (was, is) = (
            &process.timers.interval[timer],
            &live.timers.interval[timer],
        );
        let runs = was[1] != [0, 0];
        if runs || was != is {
            let value = steps.batch.input(was.as_bytes());
            let arguments = [timer.into(), value, 0.into()];
            steps.call("setitimer", libc::SYS_setitimer, &arguments);
        }
    }
    let pid = process.pid();
    let mut live = posix_timers::list(pid)?;
    for timer in &mut live {
        if revived.iter().any(|tid| timer.notifies(tid.as_raw())) {
            timer.target = 0;
        }
    }
    let namespace_tid = |target: i32| {
        let mut threads = process.threads.values();
        threads
            .find(|thread| thread.tid().as_raw() == target)
            .map_or(0, |thread| thread.record.state.namespace_tid)
    };
    let named = posix_timers::restore(
        &mut steps.batch,
        &live,
        &process.posix_timers,
        namespace_tid,
    );
    steps.named.extend(named);
    Ok(())
}

fn restore_thread(
    stopped: &mut Stopped<'_>,
    process: &RecordedProcess<'_>,
    thread: &RecordedThread<'_>,
    live: &ThreadState,
) -> Result<()> {
    let tid = thread.tid();
    let was = &thread.record.state;
    let mut steps = Steps::new(tid);
    if was.alternate_stack != live.alternate_stack {
        // `SS_ONSTACK` is an answer, not a request.
        let [address, flags, size] = was.alternate_stack;
        let stack = [address, flags & !(libc::SS_ONSTACK as u64), size];
        let stack = steps.batch.input(stack.as_bytes());
        steps.call("sigaltstack", libc::SYS_sigaltstack, &[stack, 0.into()]);
    }
    if was.robust_list != live.robust_list {
        let [head, len] = was.robust_list.map(Arg::from);
        steps.call("set_robust_list", libc::SYS_set_robust_list, &[head, len]);
    }
    if was.tid_address != live.tid_address {
        let address = was.tid_address.into();
        steps.call("set_tid_address", libc::SYS_set_tid_address, &[address]);
    }
    if was.io_priority != live.io_priority {
        let arguments = [
            probe::IOPRIO_WHO_PROCESS.into(),
            0.into(),
            was.io_priority.into(),
        ];
        steps.call("ioprio_set", libc::SYS_ioprio_set, &arguments);
    }
    if was.comm != live.comm {
        let name = steps.batch.input(&was.comm);
        steps.prctl("prctl PR_SET_NAME", libc::PR_SET_NAME, name);
    }
    if was.timer_slack != live.timer_slack && was.timer_slack != 0 {
        let slack = was.timer_slack.into();
        steps.prctl("prctl PR_SET_TIMERSLACK", libc::PR_SET_TIMERSLACK, slack);
    }
    if was.parent_death_signal != live.parent_death_signal {
        let signal = was.parent_death_signal.into();
        steps.prctl("prctl PR_SET_PDEATHSIG", libc::PR_SET_PDEATHSIG, signal);
    }
    if was.keep_capabilities != live.keep_capabilities {
        let keep = was.keep_capabilities.into();
        steps.prctl("prctl PR_SET_KEEPCAPS", libc::PR_SET_KEEPCAPS, keep);
    }
    restore_switches(&mut steps, was, live);
    let rseq = ptrace::rseq(tid).about(tid, "rseq configuration")?;
    let record = thread.record;
    if record.rseq_address != 0 && !has_rseq(record, &rseq) {
        let (size, signature) = (record.rseq_size, record.rseq_signature);
        steps.rseq(record.rseq_address, size, RSEQ_REGISTER, signature);
    }
    steps.run(stopped, process.pid())?;
    if was.scheduling != live.scheduling {
        scheduling::set_attributes(tid, &was.scheduling).about(tid, "sched_setattr")?;
    }
    if was.processors != live.processors {
        scheduling::set_processors(tid, &was.processors).about(tid, "sched_setaffinity")?;
    }
    Ok(())
}

/// What a thread has switched on or off for itself, and is rarely seen.
fn restore_switches(steps: &mut Steps, was: &ThreadState, live: &ThreadState) {
    let zero = Arg::from(0);
    if was.memory_policy != live.memory_policy {
        let MemoryPolicy { mode, nodes } = was.memory_policy;
        let (nodes, most) = match nodes.iter().any(|word| *word != 0) {
            true => (steps.batch.input(nodes.as_bytes()), probe::MOST_NODES),
            false => (zero, 0),
        };
        let arguments = [mode.into(), nodes, most.into()];
        steps.call("set_mempolicy", libc::SYS_set_mempolicy, &arguments);
    }
    if was.machine_check_policy != live.machine_check_policy {
        let policy = was.machine_check_policy.into();
        let arguments = [
            libc::PR_MCE_KILL.into(),
            libc::PR_MCE_KILL_SET.into(),
            policy,
            zero,
            zero,
        ];
        steps.call("prctl PR_MCE_KILL", libc::SYS_prctl, &arguments);
    }
    if was.time_stamp_counter != live.time_stamp_counter {
        let on = was.time_stamp_counter.into();
        steps.prctl("prctl PR_SET_TSC", libc::PR_SET_TSC, on);
    }
    if was.processor_identification != live.processor_identification {
        let arguments = [ARCH_SET_CPUID.into(), was.processor_identification.into()];
        steps.call(
            "arch_prctl ARCH_SET_CPUID",
            libc::SYS_arch_prctl,
            &arguments,
        );
    }
    let speculation = was.speculation.iter().zip(&live.speculation);
    for (which, (was, is)) in probe::SPECULATION.into_iter().zip(speculation) {
        if was != is {
            let how = (was & !u64::from(libc::PR_SPEC_PRCTL)).into();
            let arguments = [
                libc::PR_SET_SPECULATION_CTRL.into(),
                which.into(),
                how,
                zero,
                zero,
            ];
            steps.call("prctl PR_SET_SPECULATION_CTRL", libc::SYS_prctl, &arguments);
        }
    }
}

const ARCH_SET_CPUID: i32 = 0x1012;

/// Makes the queues of waiting signals as recorded. Threads other than the leader take exactly what is in their own
/// queue; one signal more would be taken from the process's.
fn restore_pending(stopped: &mut Stopped<'_>, process: &RecordedProcess<'_>) -> Result<()> {
    let leader = process.pid();
    let pid = process.namespace_pid();
    let others = process.threads.iter().filter(|(tid, _)| **tid != leader);
    for (tid, thread) in others.chain(process.threads.get_key_value(&leader)) {
        take_excess(stopped, leader, *tid, Queue::Private)?;
        let own = pending_signals(*tid, Queue::Private)?;
        let shared = if *tid == leader {
            pending_signals(leader, Queue::Shared)?
        } else {
            Vec::new()
        };
        let shared_differ = *tid == leader && shared != process.pending;
        if own == thread.pending && !shared_differ {
            continue;
        }
        let mut steps = Steps::new(*tid);
        pending::take(&mut steps.batch, pending::set(&own), own.len());
        if shared_differ {
            pending::take(&mut steps.batch, pending::set(&shared), shared.len());
            let named = pending::queue(&mut steps.batch, For::Process { pid }, process.pending);
            steps.named.extend(named);
        }
        let whom = For::Thread {
            pid,
            tid: thread.record.state.namespace_tid,
        };
        let named = pending::queue(&mut steps.batch, whom, thread.pending);
        steps.named.extend(named);
        steps.run(stopped, leader)?;
    }
    Ok(())
}

fn restore_registers(
    stopped: &mut Stopped<'_>,
    pid: Pid,
    recorded: &RecordedThread<'_>,
) -> Result<()> {
    let tid = recorded.tid();
    let gone = Error::Freeze(crate::freeze::Error::Gone(tid));
    let process = stopped.process_mut(pid).ok_or(gone)?;
    for thread in process
        .threads
        .iter_mut()
        .filter(|thread| thread.tid == tid)
    {
        thread.set_registers(&recorded.registers());
        thread.set_signal_mask(recorded.record.signal_mask);
    }
    let mut live = [0; XSTATE_ROOM];
    let len = ptrace::xstate(tid, &mut live).about(tid, "extended state")?;
    if live[..len] == *recorded.xstate {
        return Ok(());
    }
    match ptrace::set_xstate(tid, recorded.xstate) {
        Err(Errno::ESRCH) => Err(crate::freeze::Error::Gone(tid).into()),
        result => result.about(tid, "set extended state"),
    }
}
