//! Asks a stopped thread for what only itself can be asked for: one batch.

use std::mem::offset_of;

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::freeze::{Arg, Batch, Output, Outputs, StepId, Stopped};
use crate::kernel::host_names;
use crate::kernel::scheduling::{Attributes, Processors};

use super::layout::{
    Action, GROUPS, INTERVAL_TIMERS, LIMITS, MemoryPolicy, ProcessState, Rights, SIGNALS,
    ThreadState, TimersRecord,
};
use super::settings::Settings;
use super::{Error, Result};

/// Longest path that getcwd(2) gives.
const PATH_MAX: usize = libc::PATH_MAX as usize;
const STAT_SIZE: usize = size_of::<libc::stat>();
/// Of capget(2) and capset(2).
pub(super) const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Process-wide state as observed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessProbe {
    /// What is of fixed size.
    pub state: ProcessState,
    /// What it does on signals 1 to 64.
    pub actions: [Action; SIGNALS],
    /// Its interval timers.
    pub timers: TimersRecord,
    /// Path of its working directory, without a final NUL; `None` if that was deleted or is out of reach.
    pub directory: Option<Vec<u8>>,
    /// What files of `/proc` tell of it; the process itself is not asked for that.
    pub settings: Settings,
}

/// What the leader of a process tells: process-wide state and its own.
pub type Leader = (ProcessProbe, ThreadState);

/// Asks the leader of a process.
pub fn process(stopped: &mut Stopped<'_>, pid: Pid) -> Result<Leader> {
    let mut batch = Batch::new();
    let questions = Questions::add(&mut batch);
    let done = stopped.run(pid, &batch)?;
    questions.read(&done, pid)
}

/// Questions to the leader of a process, as steps of a batch.
pub struct Questions {
    of_process: ProcessSteps,
    of_thread: ThreadSteps,
}

impl Questions {
    /// Adds them to a batch.
    pub fn add(batch: &mut Batch) -> Self {
        Self {
            of_process: ProcessSteps::add(batch),
            of_thread: ThreadSteps::add(batch),
        }
    }

    /// What the batch found in process `pid`.
    pub fn read(&self, done: &Outputs, pid: Pid) -> Result<Leader> {
        Ok((
            self.of_process.read(done, pid)?,
            self.of_thread.read(done, pid)?,
        ))
    }
}

/// Asks one thread for its state.
pub fn thread(stopped: &mut Stopped<'_>, pid: Pid, tid: Pid) -> Result<ThreadState> {
    let mut batch = Batch::new();
    let steps = ThreadSteps::add(&mut batch);
    let done = stopped.run_on(pid, tid, &batch)?;
    steps.read(&done, tid)
}

/// A step whose failure is an error, with its name.
type Named = (StepId, &'static str);

struct ProcessSteps {
    actions: Output,
    timers: Output,
    state: Output,
    directory: Output,
    stats: [Output; 2],
    getcwd: StepId,
    stat_of_directory: StepId,
    umask: StepId,
    dumpable: StepId,
    huge_pages: StepId,
    personality: StepId,
    merges_memory: StepId,
    denies_write_execute: StepId,
    local_descriptors: StepId,
    names: Output,
    needed: Vec<Named>,
}

impl ProcessSteps {
    fn add(batch: &mut Batch) -> Self {
        let mut needed = Vec::new();
        let actions = batch.output(size_of::<[Action; SIGNALS]>());
        for signal in 1..=SIGNALS {
            let out = actions.at((signal - 1) * size_of::<Action>());
            let step = batch.call(
                libc::SYS_rt_sigaction,
                &[signal.into(), 0.into(), out, 8.into()],
            );
            needed.push((step, "rt_sigaction"));
        }
        let timers = batch.output(size_of::<TimersRecord>());
        for timer in 0..INTERVAL_TIMERS {
            let out = timers.at(timer * (size_of::<TimersRecord>() / INTERVAL_TIMERS));
            needed.push((
                batch.call(libc::SYS_getitimer, &[timer.into(), out]),
                "getitimer",
            ));
        }
        let state = batch.output(size_of::<ProcessState>());
        for limit in 0..LIMITS {
            let out = state.at(offset_of!(ProcessState, limits) + limit * 16);
            let step = batch.call(
                libc::SYS_prlimit64,
                &[0.into(), limit.into(), 0.into(), out],
            );
            needed.push((step, "prlimit64"));
        }
        let prctl = |batch: &mut Batch, option: i32, out: Arg| {
            batch.call(
                libc::SYS_prctl,
                &[option.into(), out, 0.into(), 0.into(), 0.into()],
            )
        };
        let subreaper = state.at(offset_of!(ProcessState, subreaper));
        let step = prctl(batch, libc::PR_GET_CHILD_SUBREAPER, subreaper);
        needed.push((step, "prctl PR_GET_CHILD_SUBREAPER"));
        let dumpable = prctl(batch, libc::PR_GET_DUMPABLE, 0.into());
        let huge_pages = prctl(batch, PR_GET_THP_DISABLE, 0.into());
        let merges_memory = prctl(batch, PR_GET_MEMORY_MERGE, 0.into());
        let denies_write_execute = prctl(batch, PR_GET_MDWE, 0.into());
        let names = batch.output(6 * host_names::MEMBER);
        needed.push((batch.call(libc::SYS_uname, &[names.arg()]), "uname"));
        let entry = batch.output(LOCAL_DESCRIPTOR);
        let arguments = [0.into(), entry.arg(), LOCAL_DESCRIPTOR.into()];
        let local_descriptors = batch.call(libc::SYS_modify_ldt, &arguments);
        let personality = batch.call(libc::SYS_personality, &[0xffff_ffffu32.into()]);
        // It can't be read without being set.
        let umask = batch.call(libc::SYS_umask, &[0.into()]);
        batch.call(libc::SYS_umask, &[umask.into()]);

        let directory = batch.output(PATH_MAX);
        let getcwd = batch.call(libc::SYS_getcwd, &[directory.arg(), PATH_MAX.into()]);
        let stats = [batch.output(STAT_SIZE), batch.output(STAT_SIZE)];
        let [dot, slash] = [batch.input(b".\0"), batch.input(b"/\0")];
        let at = Arg::from(libc::AT_FDCWD);
        let stat_of_directory =
            batch.call(libc::SYS_newfstatat, &[at, dot, stats[0].arg(), 0.into()]);
        needed.push((
            batch.call(libc::SYS_newfstatat, &[at, slash, stats[1].arg(), 0.into()]),
            "stat of the root directory",
        ));
        Self {
            actions,
            timers,
            state,
            directory,
            stats,
            getcwd,
            stat_of_directory,
            umask,
            dumpable,
            huge_pages,
            personality,
            merges_memory,
            denies_write_execute,
            local_descriptors,
            names,
            needed,
        }
    }

    fn read(&self, done: &Outputs, tid: Pid) -> Result<ProcessProbe> {
        check(&self.needed, done, tid)?;
        let number = |step, what| {
            done.result(step)
                .map_err(|errno| Error::Call { tid, what, errno })
        };
        let mut state: ProcessState = fill(done.bytes(&self.state));
        state.subreaper &= u64::from(u32::MAX);
        state.umask = number(self.umask, "umask")?;
        state.dumpable = number(self.dumpable, "prctl PR_GET_DUMPABLE")?;
        state.personality = number(self.personality, "personality")?;
        // EINVAL: a kernel without transparent huge pages.
        state.huge_pages_disabled = done.result(self.huge_pages).unwrap_or(0);
        // These too may be unknown to the kernel.
        state.merges_memory = done.result(self.merges_memory).unwrap_or(0);
        state.denies_write_execute = done.result(self.denies_write_execute).unwrap_or(0);
        // The number of bytes read is that asked for if there is a table, else 0.
        state.host_names = host_names::of(done.bytes(&self.names));
        state.local_descriptors = u64::from(done.result(self.local_descriptors).unwrap_or(0) != 0);
        // Not even a deleted directory makes this fail, but one on a filesystem that has gone does.
        if done.result(self.stat_of_directory).is_ok() {
            state.directory = device_and_inode(done.bytes(&self.stats[0]));
        }
        state.root = device_and_inode(done.bytes(&self.stats[1]));
        let directory = done
            .result(self.getcwd)
            .ok()
            .map(|len| &done.bytes(&self.directory)[..(len as usize).saturating_sub(1)])
            .filter(|path| path.starts_with(b"/"))
            .map(<[u8]>::to_vec);
        Ok(ProcessProbe {
            state,
            actions: fill(done.bytes(&self.actions)),
            timers: fill(done.bytes(&self.timers)),
            directory,
            settings: Settings::nothing(),
        })
    }
}

struct ThreadSteps {
    state: Output,
    capabilities: Output,
    gettid: StepId,
    timer_slack: StepId,
    tid_address: StepId,
    io_priority: StepId,
    no_new_privileges: StepId,
    secure_bits: StepId,
    seccomp: StepId,
    machine_check_policy: StepId,
    processor_identification: StepId,
    speculation: [StepId; 2],
    file_system: [StepId; 2],
    group_count: StepId,
    needed: Vec<Named>,
}

impl ThreadSteps {
    fn add(batch: &mut Batch) -> Self {
        const RIGHTS: usize = offset_of!(ThreadState, rights);
        let state = batch.output(size_of::<ThreadState>());
        let at = |offset| state.at(offset);
        let none = Arg::from(0);
        let mut needed = Vec::new();
        let mut need = |step, what| needed.push((step, what));

        let stack = at(offset_of!(ThreadState, alternate_stack));
        need(
            batch.call(libc::SYS_sigaltstack, &[none, stack]),
            "sigaltstack",
        );
        let robust = offset_of!(ThreadState, robust_list);
        need(
            batch.call(
                libc::SYS_get_robust_list,
                &[none, at(robust), at(robust + 8)],
            ),
            "get_robust_list",
        );
        let comm = at(offset_of!(ThreadState, comm));
        need(
            batch.call(libc::SYS_prctl, &[libc::PR_GET_NAME.into(), comm]),
            "prctl PR_GET_NAME",
        );
        let signal = at(offset_of!(ThreadState, parent_death_signal));
        need(
            batch.call(libc::SYS_prctl, &[libc::PR_GET_PDEATHSIG.into(), signal]),
            "prctl PR_GET_PDEATHSIG",
        );
        let scheduling = at(offset_of!(ThreadState, scheduling));
        need(
            batch.call(
                libc::SYS_sched_getattr,
                &[none, scheduling, size_of::<Attributes>().into(), none],
            ),
            "sched_getattr",
        );
        let processors = at(offset_of!(ThreadState, processors));
        need(
            batch.call(
                libc::SYS_sched_getaffinity,
                &[none, size_of::<Processors>().into(), processors],
            ),
            "sched_getaffinity",
        );
        let users = RIGHTS + offset_of!(Rights, users);
        need(
            batch.call(
                libc::SYS_getresuid,
                &[at(users), at(users + 4), at(users + 8)],
            ),
            "getresuid",
        );
        let groups = RIGHTS + offset_of!(Rights, groups);
        need(
            batch.call(
                libc::SYS_getresgid,
                &[at(groups), at(groups + 4), at(groups + 8)],
            ),
            "getresgid",
        );
        let header = batch.input([CAPABILITY_VERSION_3, 0].as_bytes());
        let capabilities = batch.output(24);
        need(
            batch.call(libc::SYS_capget, &[header, capabilities.arg()]),
            "capget",
        );
        let policy = offset_of!(ThreadState, memory_policy);
        let nodes = policy + offset_of!(MemoryPolicy, nodes);
        // ENOSYS: a kernel without NUMA. EINVAL: one for more nodes.
        let arguments = [at(policy), at(nodes), MOST_NODES.into(), none, none];
        batch.call(libc::SYS_get_mempolicy, &arguments);
        // These two can't fail; an id that is none is not set, and the old one is returned.
        let nobody = Arg::from(u32::MAX);
        let file_system =
            [libc::SYS_setfsuid, libc::SYS_setfsgid].map(|number| batch.call(number, &[nobody]));
        let group_count = batch.call(libc::SYS_getgroups, &[none, none]);
        // EINVAL: there are more.
        let supplementary = at(RIGHTS + offset_of!(Rights, supplementary));
        batch.call(libc::SYS_getgroups, &[GROUPS.into(), supplementary]);
        let arguments = [ARCH_GET_CPUID.into(), none];
        let processor_identification = batch.call(libc::SYS_arch_prctl, &arguments);

        let tid_address = at(offset_of!(ThreadState, tid_address));
        let counter = at(offset_of!(ThreadState, time_stamp_counter));
        let mut ask = |option: i32, out| batch.call(libc::SYS_prctl, &[option.into(), out]);
        let tid_address = ask(PR_GET_TID_ADDRESS, tid_address);
        let timer_slack = ask(libc::PR_GET_TIMERSLACK, none);
        let secure_bits = ask(libc::PR_GET_SECUREBITS, none);
        let seccomp = ask(libc::PR_GET_SECCOMP, none);
        ask(libc::PR_GET_TSC, counter);
        let mut ask = |option: i32, first: Arg| {
            batch.call(libc::SYS_prctl, &[option.into(), first, none, none, none])
        };
        let no_new_privileges = ask(libc::PR_GET_NO_NEW_PRIVS, none);
        let machine_check_policy = ask(libc::PR_MCE_KILL_GET, none);
        let speculation = SPECULATION.map(|which| ask(libc::PR_GET_SPECULATION_CTRL, which.into()));
        let io_priority = batch.call(libc::SYS_ioprio_get, &[IOPRIO_WHO_PROCESS.into(), none]);
        let gettid = batch.call(libc::SYS_gettid, &[]);
        Self {
            state,
            capabilities,
            gettid,
            timer_slack,
            tid_address,
            io_priority,
            no_new_privileges,
            secure_bits,
            seccomp,
            machine_check_policy,
            processor_identification,
            speculation,
            file_system,
            group_count,
            needed,
        }
    }

    fn read(&self, done: &Outputs, tid: Pid) -> Result<ThreadState> {
        check(&self.needed, done, tid)?;
        let number = |step, what| {
            done.result(step)
                .map_err(|errno| Error::Call { tid, what, errno })
        };
        let mut state: ThreadState = fill(done.bytes(&self.state));
        // An int between words.
        state.alternate_stack[1] &= u64::from(u32::MAX);
        state.parent_death_signal &= u64::from(u32::MAX);
        state.namespace_tid = number(self.gettid, "gettid")?;
        state.io_priority = number(self.io_priority, "ioprio_get")?;
        // Zero for the policies that have no slack.
        state.timer_slack = number(self.timer_slack, "prctl PR_GET_TIMERSLACK")?;
        // A kernel without CONFIG_CHECKPOINT_RESTORE does not tell; then it is taken to be unchanged.
        if let Err(errno) = done.result(self.tid_address)
            && errno != Errno::EINVAL
        {
            let what = "prctl PR_GET_TID_ADDRESS";
            return Err(Error::Call { tid, what, errno });
        }
        state.rights.capabilities = fill(done.bytes(&self.capabilities));
        state.rights.no_new_privileges =
            number(self.no_new_privileges, "prctl PR_GET_NO_NEW_PRIVS")?;
        let bits = number(self.secure_bits, "prctl PR_GET_SECUREBITS")?;
        state.rights.secure_bits = bits & !SECBIT_KEEP_CAPS;
        state.keep_capabilities = u64::from(bits & SECBIT_KEEP_CAPS != 0);
        state.rights.seccomp = number(self.seccomp, "prctl PR_GET_SECCOMP")?;
        for (id, step) in state.rights.file_system.iter_mut().zip(self.file_system) {
            *id = number(step, "setfsuid or setfsgid")?;
        }
        state.rights.group_count = number(self.group_count, "getgroups")?;
        // What the kernel or the processor does not have can't have been changed.
        let optional = |step| done.result(step).unwrap_or(0);
        state.machine_check_policy = optional(self.machine_check_policy);
        state.processor_identification = optional(self.processor_identification);
        state.speculation = self.speculation.map(optional);
        Ok(state)
    }
}

/// Of ioprio_get(2): one thread, 0 for the one that asks.
pub(super) const IOPRIO_WHO_PROCESS: i32 = 1;
const SECBIT_KEEP_CAPS: u64 = 1 << 4;
/// Nodes that a memory policy can name here.
pub(super) const MOST_NODES: usize = 1024;
/// `PR_SPEC_STORE_BYPASS` and `PR_SPEC_INDIRECT_BRANCH`.
pub(super) const SPECULATION: [i32; 2] = [0, 1];
const ARCH_GET_CPUID: i32 = 0x1011;
/// Linux 6.3.
const PR_GET_MDWE: i32 = 66;
/// Linux 6.4.
const PR_GET_MEMORY_MERGE: i32 = 68;
const LOCAL_DESCRIPTOR: usize = 8;
const PR_GET_THP_DISABLE: i32 = 42;
/// Linux 3.5, with `CONFIG_CHECKPOINT_RESTORE`.
const PR_GET_TID_ADDRESS: i32 = 40;

fn check(needed: &[Named], done: &Outputs, tid: Pid) -> Result<()> {
    for &(step, what) in needed {
        done.result(step)
            .map_err(|errno| Error::Call { tid, what, errno })?;
    }
    Ok(())
}

/// A value whose bytes are given; the batch made room of exactly its size.
pub(super) fn fill<T>(bytes: &[u8]) -> T
where
    T: FromBytes + FromZeros + IntoBytes + KnownLayout + Immutable,
{
    let mut value = T::new_zeroed();
    value
        .as_mut_bytes()
        .copy_from_slice(&bytes[..size_of::<T>()]);
    value
}

/// `st_dev` and `st_ino`, the first members of `struct stat`.
pub(super) fn device_and_inode(stat: &[u8]) -> [u64; 2] {
    fill(&stat[..16])
}

/// Adds a stat of a path to a batch: the room for its result, and the step.
pub(super) fn stat(batch: &mut Batch, path: Arg) -> (Output, StepId) {
    let out = batch.output(STAT_SIZE);
    let at = Arg::from(libc::AT_FDCWD);
    let step = batch.call(libc::SYS_newfstatat, &[at, path, out.arg(), 0.into()]);
    (out, step)
}
