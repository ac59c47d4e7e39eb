//! Running batches through the window into an address space.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use zerocopy::IntoBytes;

use crate::kernel::ptrace::{self, Event};
use crate::kernel::runner::{self, CODE_SIZE, Control, LIVENESS_OFFSET, REQUIRED, Step};
use crate::kernel::window::Window;
use crate::kernel::{maps, procfs};

use super::batch::{Batch, MOST_STEPS, Outputs, failure};
use super::bootstrap::Bootstrap;
use super::stopped::Stopped;
use super::thread::Thread;
use super::{Context, Error, Result, refuse};

/// Where, from the start of a window, its page store begins.
pub const STORE_OFFSET: usize = LIVENESS_OFFSET + 4096;

const STEPS_OFFSET: usize = CODE_SIZE + size_of::<Control>();
pub(super) const DATA_OFFSET: usize =
    (STEPS_OFFSET + MOST_STEPS * size_of::<Step>()).next_multiple_of(64);
const _: () = assert!(DATA_OFFSET + super::batch::MOST_DATA <= LIVENESS_OFFSET);

/// The flags register to start a batch with: interrupts enabled, direction forward.
const CLEAN_FLAGS: u64 = 0x202;

/// A window: memory shared between us and one address space of the target.
///
/// The target sees one mapping named `/memfd:snapback (deleted)`, not inherited by its children. Its first part
/// holds the runner, its steps and their data; the rest, read-only to the target, is the page store.
#[derive(Debug)]
pub struct TargetWindow {
    /// Its address in the target.
    pub address: u64,
    /// Our view of it.
    pub window: Window,
    /// Where in this address space, and in copies of it, there is room for a few instructions.
    pub(super) bootstrap: Bootstrap,
    /// The thread whose way home the control block holds, while it is held in the runner.
    occupant: Option<Pid>,
    /// What runs right now.
    under_way: Option<UnderWay>,
}

/// A batch that was started and has not been waited for.
#[derive(Debug, Clone, Copy)]
struct UnderWay {
    tid: Pid,
    steps: usize,
    data: usize,
}

impl TargetWindow {
    /// A window that was just mapped, of which the thread `opener` is held at its opening.
    pub(super) fn new(address: u64, window: Window, bootstrap: Bootstrap, opener: Pid) -> Self {
        Self {
            address,
            window,
            bootstrap,
            occupant: Some(opener),
            under_way: None,
        }
    }

    /// Where a byte of the window is in the target.
    pub fn address_of(&self, offset: usize) -> u64 {
        self.address + offset as u64
    }

    /// First address after it in the target.
    pub fn end(&self) -> u64 {
        self.address + self.window.len() as u64
    }

    /// Bytes of its page store.
    pub fn store_len(&self) -> usize {
        self.window.len() - STORE_OFFSET
    }

    /// Whether a VMA of the target is (part of) this window.
    pub fn covers(&self, vma: &maps::Vma) -> bool {
        vma.start >= self.address && vma.end <= self.end()
    }

    /// Gives back the lock that shows the tracer is alive.
    pub(super) fn hide(&mut self) {
        self.occupant = None;
        self.window.hide();
    }
}

impl Stopped<'_> {
    /// Runs a batch in the leader of a process. The process needs a window ([`Stopped::open_window`]).
    pub fn run(&mut self, pid: Pid, batch: &Batch) -> Result<Outputs> {
        self.run_on(pid, pid, batch)
    }

    /// Runs a batch in one thread.
    pub fn run_on(&mut self, pid: Pid, tid: Pid, batch: &Batch) -> Result<Outputs> {
        self.start_on(pid, tid, batch)?;
        self.finish(pid)
    }

    /// Starts a batch in the leader of a process; it is to be waited for with [`Stopped::finish`]. Until then nothing else
    /// may be done to the leader, and no other batch run in the process.
    pub fn start(&mut self, pid: Pid, batch: &Batch) -> Result<()> {
        self.start_on(pid, pid, batch)
    }

    fn start_on(&mut self, pid: Pid, tid: Pid, batch: &Batch) -> Result<()> {
        let process = self.processes.get_mut(&pid).ok_or(Error::Gone(pid))?;
        let member = self.tree.members.get_mut(&pid).ok_or(Error::Gone(pid))?;
        let target = member
            .window
            .as_mut()
            .ok_or_else(|| refuse(pid, "the window", "it is missing"))?;
        if let Some(other) = target.occupant.replace(tid).filter(|other| *other != tid) {
            // The control block is about to hold another way home: should we die, that thread must not take it.
            let threads = process.threads.iter_mut();
            threads
                .filter(|thread| thread.tid == other)
                .try_for_each(Thread::settle)?;
        }
        let thread = process.thread_mut(tid).ok_or(Error::Gone(tid))?;
        start(thread, target, batch)
    }

    /// Waits for the end of the batch that was started in a process, and for what it returned.
    pub fn finish(&mut self, pid: Pid) -> Result<Outputs> {
        let process = self.processes.get_mut(&pid).ok_or(Error::Gone(pid))?;
        let member = self.tree.members.get_mut(&pid).ok_or(Error::Gone(pid))?;
        let target = member.window.as_mut().ok_or(Error::Gone(pid))?;
        let under_way = target.under_way.ok_or(Error::Gone(pid))?;
        let thread = process
            .thread_mut(under_way.tid)
            .ok_or(Error::Gone(under_way.tid))?;
        finish(thread, target)
    }

    /// Waits for all batches that were started and not waited for: nothing can be done to their threads before.
    pub(super) fn finish_all(&mut self) {
        let is_under_way = |window: &TargetWindow| window.under_way.is_some();
        let members = self.tree.members.values();
        let pids: Vec<Pid> = members
            .filter(|member| member.window.as_ref().is_some_and(is_under_way))
            .map(|member| member.pid)
            .collect();
        for pid in pids {
            // Its thread may be gone; whoever wanted the outputs has had an error already.
            let _ = self.finish(pid);
            if let Some(window) = self
                .tree
                .members
                .get_mut(&pid)
                .and_then(|member| member.window.as_mut())
            {
                window.under_way = None;
            }
        }
    }
}

/// The number, in its own PID namespace, of the child that the last batch has forked in a window which a keeper that died
/// has left behind at an address. It died with the keeper before it was anything.
pub fn forked_last(memory: &std::fs::File, window: u64) -> Option<i32> {
    let mut control = [0; size_of::<Control>()];
    memory
        .read_exact_at(&mut control, window + CODE_SIZE as u64)
        .ok()?;
    let count_at = std::mem::offset_of!(Control, count);
    let count = u64::from_ne_bytes(*control[count_at..].first_chunk()?) as usize;
    let mut steps = vec![Step::default(); count.min(MOST_STEPS)];
    let steps_at = window + STEPS_OFFSET as u64;
    memory.read_exact_at(steps.as_mut_bytes(), steps_at).ok()?;
    let is_fork =
        |step: &&Step| step.op == runner::OP_CALL && step.number == libc::SYS_clone as u64;
    let forks = steps.iter().filter(is_fork);
    let made = forks.map(|step| step.result as i64).filter(|pid| *pid > 0);
    made.map(|pid| pid as i32).next_back()
}

/// What `/proc/PID/maps` calls a window.
pub const WINDOW_MAPPING: &[u8] = b"/memfd:snapback (deleted)";

pub(super) fn run(
    thread: &mut Thread,
    target: &mut TargetWindow,
    batch: &Batch,
) -> Result<Outputs> {
    start(thread, target, batch)?;
    finish(thread, target)
}

fn start(thread: &mut Thread, target: &mut TargetWindow, batch: &Batch) -> Result<()> {
    let tid = thread.tid;
    assert!(
        target.under_way.is_none(),
        "one batch of a process at a time"
    );
    let registers = *thread.registers()?;
    let mask = thread.signal_mask()?;
    let (home, flags) = runner::home(&registers);
    let steps = batch.encode(
        target.address_of(STEPS_OFFSET),
        target.address_of(DATA_OFFSET),
    );
    let control = Control {
        steps: target.address_of(STEPS_OFFSET),
        count: steps.len() as u64,
        mask,
        flags,
        home,
        done: 0,
    };
    target
        .window
        .show_alive()
        .context(|| "take the liveness lock".into())?;
    target.window.write(CODE_SIZE, control.as_bytes());
    target.window.write(STEPS_OFFSET, steps.as_bytes());
    let data = batch.data(target.address_of(DATA_OFFSET));
    target.window.write(DATA_OFFSET, &data);

    if !thread.state.signals_blocked {
        thread.state.mask_differs = true;
        ptrace::set_signal_mask(tid, runner::BLOCKED)
            .context(|| format!("block signals of {tid}"))?;
        thread.state.signals_blocked = true;
    }
    let mut start = registers;
    start.rip = target.address;
    start.rsp = target.address_of(STEPS_OFFSET);
    start.eflags = CLEAN_FLAGS;
    start.orig_rax = u64::MAX;
    thread.state.registers_differ = true;
    ptrace::set_registers(tid, &start).context(|| format!("set registers of {tid}"))?;
    ptrace::resume(tid, 0).context(|| format!("resume {tid}"))?;
    target.under_way = Some(UnderWay {
        tid,
        steps: steps.len(),
        data: data.len(),
    });
    Ok(())
}

fn finish(thread: &mut Thread, target: &mut TargetWindow) -> Result<Outputs> {
    let tid = thread.tid;
    let Some(UnderWay { steps, data, .. }) = target.under_way.take() else {
        return Err(Error::Gone(tid));
    };
    let born = await_trap(thread)?;
    let mut done = [0; size_of::<u64>()];
    target
        .window
        .read(CODE_SIZE + std::mem::offset_of!(Control, done), &mut done);
    if u64::from_ne_bytes(done) == 0 {
        // Somebody has sent it this very signal.
        return Err(Error::Unexpected {
            tid,
            event: "a SIGTRAP of its own".into(),
        });
    }
    let mut results = vec![Step::default(); steps];
    target.window.read(STEPS_OFFSET, results.as_mut_bytes());
    let mut outputs = vec![0; data];
    target.window.read(DATA_OFFSET, &mut outputs);
    Ok(Outputs {
        cut_short: results
            .iter()
            .filter(|step| step.flags & REQUIRED != 0)
            .find_map(|step| failure(step.result)),
        results: results.iter().map(|step| step.result).collect(),
        data: outputs,
        born,
    })
}

/// Waits for the trap at the end of a batch or step; collects the children made on the way.
fn await_trap(thread: &mut Thread) -> Result<Vec<Pid>> {
    let tid = thread.tid;
    let mut born = Vec::new();
    loop {
        match wait(tid)? {
            Event::Signal(libc::SIGTRAP) => break,
            Event::Forked(child) => born.push(child),
            // The interrupt that stopped it may be reported once more.
            Event::Interrupted | Event::Other(_) => {}
            // These can't be blocked. It gets it when it runs on.
            Event::Signal(libc::SIGSTOP) => thread.state.owed = Some(libc::SIGSTOP),
            event @ Event::Signal(_) => {
                return Err(Error::Unexpected {
                    tid,
                    event: format!("{event:?}"),
                });
            }
            Event::Exited(_) => return Err(Error::Gone(tid)),
        }
        ptrace::resume(tid, 0).context(|| format!("resume {tid}"))?;
    }
    // They get to their stops while their parent goes on.
    born.iter().try_for_each(|child| await_birth(*child))?;
    Ok(born)
}

/// Waits until a child that a traced task has made is stopped.
pub(super) fn await_birth(child: Pid) -> Result<()> {
    match ptrace::wait(child).context(|| format!("wait for {child}"))? {
        Event::Interrupted => Ok(()),
        event => Err(Error::Unexpected {
            tid: child,
            event: format!("{event:?}"),
        }),
    }
}

/// Most batches end within microseconds: look for so long before going to sleep, from which it takes as long to wake up.
const LOOK: Duration = Duration::from_micros(100);

/// Waits for the next stop, or the end, of a task that runs.
pub(super) fn wait(tid: Pid) -> Result<Event> {
    let began = Instant::now();
    loop {
        for _ in 0..16 {
            if let Some(event) = ptrace::poll(tid).context(|| format!("wait for {tid}"))? {
                return Ok(event);
            }
        }
        if began.elapsed() > LOOK {
            let status = std::fs::read_to_string(procfs::path(tid, "status"));
            return match procfs::is_init_below(&status.unwrap_or_default()) {
                true => wait_for_init(tid),
                false => ptrace::wait(tid).context(|| format!("wait for {tid}")),
            };
        }
    }
}

/// As [`wait`], for the init of a PID namespace. That is not reported to have ended before all else in the namespace has been
/// reaped, and shadows are reaped by us (pid_namespaces(7); `zap_pid_ns_processes` in `kernel/pid_namespace.c`).
fn wait_for_init(tid: Pid) -> Result<Event> {
    /// `PF_EXITING` among the flags of proc_pid_stat(5).
    const EXITING: u64 = 4;
    let began = Instant::now();
    loop {
        if let Some(event) = ptrace::poll(tid).context(|| format!("wait for {tid}"))? {
            return Ok(event);
        }
        let exiting = procfs::Stat::read(tid).map_or(true, |stat| stat.field(9) & EXITING != 0);
        if exiting {
            return Err(Error::Gone(tid));
        }
        let pause = began.elapsed() / 16;
        std::thread::sleep(pause.clamp(Duration::from_micros(20), Duration::from_millis(5)));
    }
}
