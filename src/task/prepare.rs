//! What has to be done to stopped threads before anything else runs on them.

use std::os::unix::fs::FileExt;

use nix::unistd::Pid;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::freeze::{Process, Stopped};
use crate::kernel::ptrace::{self, Queue, Registers, RseqConfiguration};
use crate::kernel::{procfs, remote_memory};

use super::{About, Result, interrupted, pending};

/// Makes it safe to run batches on the threads of a stopped tree, and undoes what the stop itself did to them.
///
/// A thread inside a restartable sequence is sent to the sequence's abort handler, as the kernel would do on its way
/// back to it (rseq(2)), which it can't once the thread runs something else first. A call that has failed with `EINTR`
/// because of the stop alone starts again.
pub fn prepare(stopped: &mut Stopped<'_>) -> Result<()> {
    let pids: Vec<Pid> = stopped
        .processes()
        .filter(|process| !process.is_zombie())
        .map(|process| process.pid)
        .collect();
    for pid in pids {
        let Some(process) = stopped.process_mut(pid) else {
            continue;
        };
        restart_calls(process)?;
        name_calls(stopped, pid)?;
        let Some(process) = stopped.process_mut(pid) else {
            continue;
        };
        let aborted = abort_sequences(process)?;
        let memory = &stopped.member(pid)?.memory;
        for area in aborted {
            memory
                .write_all_at(&[0; 8], area + SEQUENCE_OFFSET)
                .about(pid, "clearing rseq_cs")?;
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

/// A call that goes on by a restart block does so as restart_syscall(2). When it is interrupted again, be it by the next of our
/// stops, its number is not to be seen any more, without which it can't start again after a rollback. So that is noted, and
/// put back.
fn name_calls(stopped: &mut Stopped<'_>, pid: Pid) -> Result<()> {
    let Some(process) = stopped.process_mut(pid) else {
        return Ok(());
    };
    let mut calls = Vec::new();
    for thread in &mut process.threads {
        let registers = *thread.registers()?;
        if interrupted::has_restart_block(&registers) {
            calls.push((thread.tid, registers));
        }
    }
    let gone = || crate::freeze::Error::Gone(pid);
    let member = stopped.tree_mut().member_mut(pid).ok_or_else(gone)?;
    let before = std::mem::take(&mut member.calls);
    for (tid, registers) in calls {
        let call = (tid, interrupted::place(&registers));
        let number = if interrupted::is_unnamed(&registers) {
            let by_code = || number_at(&stopped.member(pid).ok()?.memory, registers.rip);
            match before.get(&call).copied().or_else(by_code) {
                Some(number) => number,
                None => continue,
            }
        } else {
            registers.orig_rax
        };
        let process = stopped.process_mut(pid).ok_or_else(gone)?;
        let mut threads = process.threads.iter_mut();
        if let Some(thread) = threads.find(|thread| thread.tid == tid)
            && number != registers.orig_rax
        {
            thread.set_registers(&interrupted::named(&registers, number));
        }
        let member = stopped.tree_mut().member_mut(pid).ok_or_else(gone)?;
        member.calls.insert(call, number);
    }
    Ok(())
}

/// The number of the call that returns to an address, if the code there says it plainly.
fn number_at(memory: &std::fs::File, returns_to: u64) -> Option<u64> {
    let mut code = [0; interrupted::INSTRUCTIONS];
    let at = returns_to.checked_sub(code.len() as u64)?;
    memory.read_exact_at(&mut code, at).ok()?;
    interrupted::number_in(&code)
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
