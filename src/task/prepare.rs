//! What has to be done to stopped threads before anything else runs on them.

use std::os::unix::fs::FileExt;

use nix::unistd::Pid;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::freeze::{Process, Stopped, UnknownCall, refuse};
use crate::kernel::ptrace::{self, Queue, Registers, RseqConfiguration};
use crate::kernel::{procfs, remote_memory};

use super::{About, Result, interrupted, pending};

/// Makes it safe to run batches on the threads of a stopped tree, and undoes what the stop itself did to them.
///
/// A thread inside a restartable sequence is sent to the sequence's abort handler, as the kernel would do on its way
/// back to it (rseq(2)), which it can't once the thread runs something else first. A call that has failed with `EINTR`
/// because of the stop alone starts again.
///
/// Returns threads that are in a call of which it is not known which it is: a checkpoint of them is refused, unless
/// [`Tree::learn_calls`](crate::freeze::Tree::learn_calls) finds out.
///
/// # Errors
///
/// A refusal, before anything is touched, if a thread has its system calls dispatched to the program.
pub fn prepare(stopped: &mut Stopped<'_>) -> Result<Vec<UnknownCall>> {
    let unknown = stopped.note_calls()?;
    let pids: Vec<Pid> = stopped
        .processes()
        .filter(|process| !process.is_zombie())
        .map(|process| process.pid)
        .collect();
    for pid in pids {
        let Some(process) = stopped.process_mut(pid) else {
            continue;
        };
        check_dispatch(process)?;
        restart_calls(process)?;
        let aborted = abort_sequences(process)?;
        let memory = &stopped.member(pid)?.memory;
        for area in aborted {
            memory
                .write_all_at(&[0; 8], area + SEQUENCE_OFFSET)
                .about(pid, "clearing rseq_cs")?;
        }
    }
    Ok(unknown)
}

/// Refuses if calls that a batch makes might be handed to the program instead.
fn check_dispatch(process: &Process) -> Result<()> {
    for thread in &process.threads {
        let tid = thread.tid;
        if ptrace::dispatches_calls(tid).about(tid, "syscall user dispatch")? {
            return Err(refuse(
                process.pid,
                format!("thread {tid}: its syscall user dispatch"),
                "its system calls are handed to the program itself, as Wine does; such programs can't be taken",
            )
            .into());
        }
    }
    Ok(())
}

fn restart_calls(process: &mut Process) -> Result<()> {
    let pid = process.pid;
    for thread in &mut process.threads {
        let registers = *thread.registers()?;
        if !interrupted::maybe_ended_by_stop(&registers) {
            continue;
        }
        let mask = thread.signal_mask()?;
        if !has_deliverable_signal(pid, thread.tid, mask)? {
            thread.set_registers(&interrupted::from_the_start(&registers));
        }
    }
    Ok(())
}

/// Whether a signal waits that will interrupt what the thread does: neither blocked nor ignored.
fn has_deliverable_signal(pid: Pid, tid: Pid, blocked: u64) -> Result<bool> {
    let mut waiting = 0;
    for queue in [Queue::Private, Queue::Shared] {
        let signals = ptrace::pending_signals(tid, queue).about(tid, "pending signals")?;
        waiting |= pending::set(&signals);
    }
    waiting &= !blocked;
    if waiting == 0 {
        return Ok(false);
    }
    let status = std::fs::read_to_string(procfs::path(pid, "status")).about(pid, "status")?;
    let set = |key| {
        procfs::status_line(&status, key)
            .and_then(|value| u64::from_str_radix(value, 16).ok())
            .unwrap_or(0)
    };
    let ignored = set("SigIgn") | (pending::IGNORED_BY_DEFAULT & !set("SigCgt"));
    Ok(waiting & !ignored != 0)
}

/// `struct rseq_cs` (`linux/rseq.h`): a restartable sequence.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Sequence {
    version: u32,
    flags: u32,
    start: u64,
    length: u64,
    abort: u64,
}

/// Where in `struct rseq` the address of the current sequence is.
const SEQUENCE_OFFSET: u64 = 8;

impl Sequence {
    /// Whether a thread with these registers is inside of it.
    fn holds(&self, registers: &Registers) -> bool {
        registers.rip.wrapping_sub(self.start) < self.length
    }
}

/// Sends threads that are inside a sequence to its abort handler; the areas whose pointer is to be cleared.
fn abort_sequences(process: &mut Process) -> Result<Vec<u64>> {
    let pid = process.pid;
    let mut areas = Vec::with_capacity(process.threads.len());
    for (index, thread) in process.threads.iter().enumerate() {
        let RseqConfiguration { address, .. } =
            ptrace::rseq(thread.tid).about(thread.tid, "rseq configuration")?;
        if address != 0 {
            areas.push((index, address));
        }
    }
    let mut aborted = Vec::new();
    for ((index, area), address) in areas.iter().zip(sequences(pid, &areas)) {
        if address == 0 {
            continue;
        }
        let thread = &mut process.threads[*index];
        let Some(sequence) = read::<Sequence>(pid, address) else {
            // The kernel kills such a thread when it returns; leave that to it.
            continue;
        };
        let registers = *thread.registers()?;
        if sequence.holds(&registers) {
            thread.set_registers(&Registers {
                rip: sequence.abort,
                ..registers
            });
            aborted.push(*area);
        }
    }
    Ok(aborted)
}

/// The pointers to the current sequences, by one read if all areas are readable.
fn sequences(pid: Pid, areas: &[(usize, u64)]) -> Vec<u64> {
    let range = |area: u64| remote_memory::Range {
        start: area + SEQUENCE_OFFSET,
        len: size_of::<u64>(),
    };
    let ranges: Vec<_> = areas.iter().map(|&(_, area)| range(area)).collect();
    let mut pointers = vec![0u64; areas.len()];
    if remote_memory::read(pid, &ranges, pointers.as_mut_bytes()).is_err() {
        for (pointer, &(_, area)) in pointers.iter_mut().zip(areas) {
            *pointer = read(pid, area + SEQUENCE_OFFSET).unwrap_or(0);
        }
    }
    pointers
}

fn read<T: FromBytes + IntoBytes + FromZeros>(pid: Pid, start: u64) -> Option<T> {
    let mut value = T::new_zeroed();
    let len = size_of::<T>();
    remote_memory::read(
        pid,
        &[remote_memory::Range { start, len }],
        value.as_mut_bytes(),
    )
    .ok()?;
    Some(value)
}
