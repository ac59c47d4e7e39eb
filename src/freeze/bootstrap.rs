//! Where the first instructions go in an address space that has no window, and running them.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::kernel::bootstrap::{self, Opening};
use crate::kernel::ptrace::{self, Event, Registers};
use crate::kernel::{maps, procfs, remote_memory, runner};

use super::inject::wait;
use super::thread::Thread;
use super::{Context, Error, Result, refuse};

/// A call's number and its first arguments.
type Call = (libc::c_long, [u64; 2]);

/// Tells code of ours.
const MARK: &[u8] = b"snapback";

/// A place in the target for the few instructions that make its first calls: the zero padding behind the vDSO's
/// ELF image, which every address space has and nothing reads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bootstrap {
    pub(super) address: u64,
    /// Whether there was code of a tracer that has died.
    is_left: bool,
}

impl Bootstrap {
    /// Room for the code and what it needs.
    pub(super) const SIZE: usize = 384;
    /// Where in it, behind the code of a single call, what the call points to is.
    pub(super) const DATA: u64 = 64;

    /// Finds it; also returns the VMAs of the address space. What a tracer that died has left there is taken for room.
    pub(super) fn find(pid: Pid, held_maps: &File) -> Result<(Self, Vec<maps::Vma>)> {
        let text = procfs::read_held(held_maps).context(|| format!("read /proc/{pid}/maps"))?;
        let vmas = maps::parse(&text).unwrap_or_default();
        let vdso = vmas
            .iter()
            .find(|vma| &*vma.name == b"[vdso]")
            .ok_or_else(|| {
                refuse(
                    pid,
                    "its address space",
                    "it has no vDSO (or the process has exec'd meanwhile)",
                )
            })?;
        let address = vdso.end - Self::SIZE as u64;
        let mut padding = [0; Self::SIZE];
        let range = remote_memory::Range {
            start: address,
            len: Self::SIZE,
        };
        remote_memory::read(pid, &[range], &mut padding)
            .context(|| format!("read the vDSO of {pid}"))?;
        let is_left = padding.ends_with(MARK);
        if padding != [0; Self::SIZE] && !is_left {
            return Err(refuse(
                pid,
                "its vDSO",
                "it has no free room at its end; this kernel is not supported",
            ));
        }
        Ok((Self { address, is_left }, vmas))
    }

    /// Whether a thread with these registers is in code that a tracer has left there when it died: on its way home.
    pub(super) fn leads_home(&self, registers: &Registers) -> bool {
        self.is_left && registers.rip.wrapping_sub(self.address) < Self::SIZE as u64
    }

    /// Has a thread make what a window is made of, and stop: what memfd_create(2), mmap(2) and userfaultfd(2) have returned. The
    /// code has to be erased before anything else is done to the thread.
    pub(super) fn open(
        &self,
        thread: &mut Thread,
        memory: &File,
        opening: &Opening<'_>,
    ) -> Result<[std::result::Result<u64, Errno>; 3]> {
        let tid = thread.tid;
        let registers = *thread.registers()?;
        let (code, stops_at) = bootstrap::opening(opening, &registers, thread.signal_mask()?);
        self.start(thread, memory, &code, runner::BLOCKED, &registers)?;
        ptrace::resume(tid, 0).context(|| format!("resume {tid}"))?;
        loop {
            match wait(tid)? {
                Event::Signal(libc::SIGTRAP) => break,
                event => pass_over(thread, event)?,
            }
            ptrace::resume(tid, 0).context(|| format!("resume {tid}"))?;
        }
        thread.state.signals_blocked = true;
        let found = ptrace::registers(tid).context(|| format!("registers of {tid}"))?;
        if found.rip != self.address + stops_at {
            // Somebody has sent it this very signal.
            return Err(Error::Unexpected {
                tid,
                event: "a SIGTRAP of its own".into(),
            });
        }
        Ok(bootstrap::opened(&found).map(returned))
    }

    /// Makes calls, one after the other, each between two stops. Returns the first failure of one.
    pub(super) fn call_each(
        &self,
        thread: &mut Thread,
        memory: &File,
        calls: impl IntoIterator<Item = Call>,
    ) -> Result<std::result::Result<(), Errno>> {
        let mut result = Ok(());
        for call in calls {
            result = result.and(self.call(thread, memory, call)?.map(drop));
        }
        leave_call(thread.tid)?;
        self.erase(memory)?;
        Ok(result)
    }

    fn call(
        &self,
        thread: &mut Thread,
        memory: &File,
        (number, [rdi, rsi]): Call,
    ) -> Result<std::result::Result<u64, Errno>> {
        let tid = thread.tid;
        let registers = *thread.registers()?;
        let code = bootstrap::call(&registers, thread.signal_mask()?);
        let call = Registers {
            rax: number as u64,
            rdi,
            rsi,
            ..registers
        };
        thread.state.signals_blocked = false;
        self.start(thread, memory, &code, u64::MAX, &call)?;
        // It stops at the beginning of the call and at its end.
        for _ in 0..2 {
            await_call(thread)?;
        }
        let found = ptrace::registers(tid).context(|| format!("registers of {tid}"))?;
        Ok(returned(found.rax))
    }

    /// Writes code and has the thread begin there with these registers otherwise, when it runs on.
    fn start(
        &self,
        thread: &mut Thread,
        memory: &File,
        code: &[u8],
        mask: u64,
        registers: &Registers,
    ) -> Result<()> {
        let tid = thread.tid;
        let room = Self::SIZE - MARK.len();
        assert!(code.len() <= room);
        let mut text = code.to_vec();
        text.resize(room, 0);
        text.extend(MARK);
        memory
            .write_all_at(&text, self.address)
            .context(|| format!("write to the vDSO padding of {tid}"))?;
        thread.state.mask_differs = true;
        ptrace::set_signal_mask(tid, mask).context(|| format!("block signals of {tid}"))?;
        thread.state.registers_differ = true;
        let start = Registers {
            orig_rax: u64::MAX,
            rip: self.address,
            ..*registers
        };
        ptrace::set_registers(tid, &start).context(|| format!("set registers of {tid}"))
    }

    pub(super) fn erase(&self, memory: &File) -> Result<()> {
        memory
            .write_all_at(&[0; Self::SIZE], self.address)
            .context(|| "clean the vDSO padding".into())
    }
}

/// Runs a thread to the beginning or end of a call.
pub(super) fn await_call(thread: &mut Thread) -> Result<()> {
    let tid = thread.tid;
    loop {
        ptrace::run_to_call(tid).context(|| format!("run {tid} to a call"))?;
        match wait(tid)? {
            Event::Signal(libc::SIGTRAP) => return Ok(()),
            event => pass_over(thread, event)?,
        }
    }
}

/// Takes note of an event that does not end what a thread is at.
fn pass_over(thread: &mut Thread, event: Event) -> Result<()> {
    let tid = thread.tid;
    match event {
        // The interrupt that stopped it may be reported once more.
        Event::Interrupted => Ok(()),
        // It can't be blocked. The thread gets it when it runs on.
        Event::Signal(libc::SIGSTOP) => {
            thread.state.owed = Some(libc::SIGSTOP);
            Ok(())
        }
        Event::Exited(_) => Err(Error::Gone(tid)),
        event => Err(Error::Unexpected {
            tid,
            event: format!("{event:?}"),
        }),
    }
}

/// What a system call has returned, by the register.
fn returned(rax: u64) -> std::result::Result<u64, Errno> {
    match super::batch::failure(rax) {
        Some(errno) => Err(errno),
        None => Ok(rax),
    }
}

/// Takes a thread from the end of a call to where it looks whether the call that the program was in is to be
/// restarted, which it does for other stops only.
pub(super) fn leave_call(tid: Pid) -> Result<()> {
    ptrace::interrupt(tid).context(|| format!("interrupt {tid}"))?;
    loop {
        ptrace::resume(tid, 0).context(|| format!("resume {tid}"))?;
        match wait(tid)? {
            Event::Interrupted => return Ok(()),
            Event::Exited(_) => return Err(Error::Gone(tid)),
            _ => {}
        }
    }
}
