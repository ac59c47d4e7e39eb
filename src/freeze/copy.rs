//! System calls in shadows, and in copies on their way to be one.

use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::kernel::ptrace::{self, Event, Options};
use crate::kernel::{procfs, runner};

use super::batch::failure;
use super::bootstrap::Bootstrap;
use super::inject::{await_birth, wait};
use super::stopped::Stopped;
use super::{Context, Error, Result};

impl Stopped<'_> {
    /// Starts up to four calls in a stopped copy of a process's address space that is never to run on, and is traced by
    /// this thread: a shadow. It has no window.
    pub fn start_in_copy(&self, original: Pid, copy: Pid, calls: &[PlainCall]) -> Result<InCopy> {
        let target = self
            .member(original)?
            .window
            .as_ref()
            .ok_or(Error::Gone(original))?;
        let calls = |_| (calls.to_vec(), Vec::new());
        InCopy::start(copy, target.bootstrap.address, calls, || Ok(()))
    }

    /// Has a shadow make one system call, right after `before`; its arguments may point to the data that `call` gives, and
    /// of which it is told the address. Returns what the call returned and the child that it made, if it did.
    pub(super) fn call_in_shadow(
        shadow: Pid,
        call: impl FnOnce(u64) -> (PlainCall, Vec<u8>),
        before: impl FnOnce() -> Result<()>,
    ) -> Result<(std::result::Result<u64, Errno>, Option<Pid>)> {
        let maps = std::fs::File::open(procfs::path(shadow, "maps"))
            .context(|| format!("open /proc/{shadow}/maps"))?;
        let (place, _) = Bootstrap::find(shadow, &maps)?;
        ptrace::set_options(shadow, Options::HOLD_OR_KILL)
            .context(|| format!("ptrace options of shadow {shadow}"))?;
        let calls = |data| {
            let (call, data) = call(data);
            (vec![call], data)
        };
        let mut calls = InCopy::start(shadow, place.address, calls, before)?;
        let mut born = Vec::new();
        let results = calls.await_end(&mut born)?;
        ptrace::set_options(shadow, Options::SHADOW)
            .context(|| format!("ptrace options of shadow {shadow}"))?;
        for child in &born {
            let memory = std::fs::OpenOptions::new()
                .write(true)
                .open(procfs::path(*child, "mem"))
                .context(|| format!("open /proc/{child}/mem"))?;
            place.erase(&memory)?;
        }
        let result = results.first().copied().unwrap_or_default();
        Ok((failure(result).map_or(Ok(result), Err), born.pop()))
    }
}

/// A system call with up to three arguments, for [`Stopped::start_in_copy`].
pub type PlainCall = (libc::c_long, [u64; 3]);

/// Calls that were started in a copy of an address space.
#[derive(Debug)]
pub struct InCopy {
    copy: Pid,
    memory: std::fs::File,
    place: u64,
    code: usize,
    calls: usize,
}

impl InCopy {
    /// Starts calls, with what they need in memory, in a stopped copy in whose address space there is room at `place`.
    /// `before` comes last.
    fn start(
        copy: Pid,
        place: u64,
        calls: impl FnOnce(u64) -> (Vec<PlainCall>, Vec<u8>),
        before: impl FnOnce() -> Result<()>,
    ) -> Result<Self> {
        let data_at = place + Bootstrap::DATA;
        let (calls, data) = calls(data_at);
        let mut code = runner::calls(&calls);
        if !data.is_empty() {
            assert!(code.len() <= Bootstrap::DATA as usize);
            code.resize(Bootstrap::DATA as usize, 0);
            code.extend(data);
        }
        assert!(code.len() <= Bootstrap::SIZE);
        let memory = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(procfs::path(copy, "mem"))
            .context(|| format!("open /proc/{copy}/mem"))?;
        memory
            .write_all_at(&code, place)
            .context(|| format!("write to the vDSO padding of {copy}"))?;
        let mut registers = ptrace::registers(copy).context(|| format!("registers of {copy}"))?;
        (registers.rip, registers.orig_rax) = (place, u64::MAX);
        ptrace::set_registers(copy, &registers).context(|| format!("set registers of {copy}"))?;
        before()?;
        ptrace::resume(copy, 0).context(|| format!("resume {copy}"))?;
        Ok(Self {
            copy,
            memory,
            place,
            code: code.len(),
            calls: calls.len(),
        })
    }

    /// Waits for them. Returns the first failure, or the copy's `/proc/PID/mem`, to be read and written.
    pub fn finish(mut self) -> Result<std::fs::File> {
        let results = self.await_end(&mut Vec::new())?;
        match results.iter().find_map(|result| failure(*result)) {
            None => Ok(self.memory),
            Some(errno) => Err(Error::Call {
                pid: self.copy,
                what: "preparing the shadow",
                errno,
            }),
        }
    }

    /// Waits for the end, and returns what the calls returned; `born` gets the children made on the way, whose memory has
    /// the code that the copy's had.
    fn await_end(&mut self, born: &mut Vec<Pid>) -> Result<Vec<u64>> {
        let copy = self.copy;
        loop {
            match wait(copy)? {
                Event::Signal(libc::SIGTRAP) => break,
                Event::Exited(_) => return Err(Error::Gone(copy)),
                Event::Forked(child) => {
                    await_birth(child)?;
                    born.push(child);
                }
                // Signals sent to it are not for it.
                _ => {}
            }
            ptrace::resume(copy, 0).context(|| format!("resume {copy}"))?;
        }
        self.memory
            .write_all_at(&vec![0; self.code], self.place)
            .context(|| "clean the vDSO padding".into())?;
        let registers = ptrace::registers(copy).context(|| format!("registers of {copy}"))?;
        let results = [registers.r12, registers.r13, registers.r14, registers.r15];
        Ok(results[..self.calls].to_vec())
    }
}
