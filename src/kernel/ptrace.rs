//! ptrace(2) requests on seized tasks, one function each.
//!
//! ptrace is bound to the thread that seized the task: every function here fails with `ESRCH` on another thread,
//! and also on a task that is not in a ptrace-stop (except [`seize`] and [`interrupt`]).
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;

use nix::errno::Errno;
use nix::unistd::Pid;

/// The general registers of a task, as `PTRACE_GETREGS` gives them.
pub type Registers = libc::user_regs_struct;

type Result<T> = std::result::Result<T, Errno>;

/// `PTRACE_O_*` bits given when a task is seized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options(u32);

impl Options {
    /// Children and threads made while seized are seized too; seccomp filters are suspended (Linux 4.3, needs
    /// `CAP_SYS_ADMIN`). The task runs on if the tracer dies.
    pub const HOLD: Self = Self(
        (libc::PTRACE_O_TRACECLONE
            | libc::PTRACE_O_TRACEFORK
            | libc::PTRACE_O_TRACEVFORK
            | libc::PTRACE_O_SUSPEND_SECCOMP) as u32,
    );
    /// As [`Options::HOLD`], and the task is killed when the tracer dies (Linux 3.8).
    pub const HOLD_OR_KILL: Self = Self(Self::HOLD.0 | libc::PTRACE_O_EXITKILL as u32);
    /// As [`Options::HOLD_OR_KILL`], and it stops when it has executed a program.
    pub const UNTIL_EXECUTED: Self = Self(Self::HOLD_OR_KILL.0 | libc::PTRACE_O_TRACEEXEC as u32);
    /// For a shadow: it dies with its tracer and is otherwise left alone.
    pub const SHADOW: Self = Self(libc::PTRACE_O_EXITKILL as u32);
    /// As [`Options::SHADOW`], and it stops when it is about to end, while it still has its memory ([`EXITING`]).
    pub const SHADOW_OF_CONTAINER: Self = Self(Self::SHADOW.0 | libc::PTRACE_O_TRACEEXIT as u32);
}

/// The [`Event::Other`] of a task that is about to end (`PTRACE_EVENT_EXIT`): it runs no code of the program any more.
pub const EXITING: i32 = libc::PTRACE_EVENT_EXIT;

/// What a wait on a task reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// `PTRACE_EVENT_STOP`: an interrupt, a group stop or the first stop of an auto-seized child.
    Interrupted,
    /// `PTRACE_EVENT_CLONE`, `_FORK` or `_VFORK`: the task made the child with this TID.
    Forked(Pid),
    /// Any other `PTRACE_EVENT_*`.
    Other(i32),
    /// A signal is about to be delivered.
    Signal(i32),
    /// The task is gone, with this wait status.
    Exited(i32),
}

fn request(request: u32, tid: Pid, addr: usize, data: usize) -> Result<libc::c_long> {
    // SAFETY: only used with requests that take integers in `addr` and `data`, or with pointers that the caller in
    // this file derives from live references of the right type.
    Errno::result(unsafe {
        libc::ptrace(
            request,
            tid.as_raw(),
            addr as *mut c_void,
            data as *mut c_void,
        )
    })
}

/// Attaches to a task without stopping it (`PTRACE_SEIZE`, Linux 3.4).
pub fn seize(tid: Pid, options: Options) -> Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, options.0 as usize).map(drop)
}

/// Changes the options of a stopped task.
pub fn set_options(tid: Pid, options: Options) -> Result<()> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, options.0 as usize).map(drop)
}

/// Asks a seized task to stop; the stop is reported by [`poll`].
pub fn interrupt(tid: Pid) -> Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped task run, delivering `signal` if it is not 0.
pub fn resume(tid: Pid, signal: i32) -> Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// As [`resume`], of a task that was asked to stop and has stopped for another reason, which takes the request back
/// (`ptrace_stop` in `kernel/signal.c`): it is asked again first.
pub fn resume_to_stop(tid: Pid, signal: i32) -> Result<()> {
    interrupt(tid)?;
    resume(tid, signal)
}

/// Lets a stopped task run to the next beginning or end of a system call, which are both reported as `SIGTRAP` (not a
/// signal: the task's action for it does not matter).
pub fn run_to_call(tid: Pid) -> Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

/// Detaches from a stopped task, which runs on, delivering `signal` if it is not 0.
pub fn detach(tid: Pid, signal: i32) -> Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// Reads the general registers.
pub fn registers(tid: Pid) -> Result<Registers> {
    // SAFETY: user_regs_struct is plain integers; all zeroes is a value of it.
    let mut regs: Registers = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, tid, 0, &raw mut regs as usize)?;
    Ok(regs)
}

/// Writes the general registers.
pub fn set_registers(tid: Pid, regs: &Registers) -> Result<()> {
    request(
        libc::PTRACE_SETREGS,
        tid,
        0,
        std::ptr::from_ref(regs) as usize,
    )
    .map(drop)
}

/// The regset of the XSAVE area (`NT_X86_XSTATE`, `include/uapi/linux/elf.h`).
const NT_X86_XSTATE: usize = 0x202;

/// Reads the extended state (x87, SSE, AVX …, XSAVE layout) into `buffer`, returning its length in bytes.
pub fn xstate(tid: Pid, buffer: &mut [u8]) -> Result<usize> {
    let mut iov = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    request(
        libc::PTRACE_GETREGSET,
        tid,
        NT_X86_XSTATE,
        &raw mut iov as usize,
    )?;
    Ok(iov.iov_len)
}

/// Writes the extended state as [`xstate`] read it.
pub fn set_xstate(tid: Pid, state: &[u8]) -> Result<()> {
    let mut iov = libc::iovec {
        iov_base: state.as_ptr().cast_mut().cast(),
        iov_len: state.len(),
    };
    request(
        libc::PTRACE_SETREGSET,
        tid,
        NT_X86_XSTATE,
        &raw mut iov as usize,
    )
    .map(drop)
}

/// Reads the mask of blocked signals, bit `n - 1` for signal `n`. In a call that has put a temporary mask in place
/// (`ppoll`, `sigsuspend`) it is the one that will be restored.
pub fn signal_mask(tid: Pid) -> Result<u64> {
    let mut mask = 0u64;
    request(libc::PTRACE_GETSIGMASK, tid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

/// Writes the mask of blocked signals.
pub fn set_signal_mask(tid: Pid, mask: u64) -> Result<()> {
    request(libc::PTRACE_SETSIGMASK, tid, 8, &raw const mask as usize).map(drop)
}

/// The size of the kernel's `siginfo_t` in bytes.
pub const SIGINFO_SIZE: usize = 128;

/// A queued signal, the kernel's `siginfo_t` byte for byte.
pub type SignalInfo = [u8; SIGINFO_SIZE];

/// Which queue of pending signals is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// The thread's own.
    Private,
    /// The one all threads of the process share.
    Shared,
}

#[repr(C)]
struct PeekSigInfo {
    offset: u64,
    flags: u32,
    count: i32,
}

/// Reads the pending signals of a stopped task without removing them (`PTRACE_PEEKSIGINFO`, Linux 3.10).
pub fn pending_signals(tid: Pid, queue: Queue) -> Result<Vec<SignalInfo>> {
    const BATCH: usize = 32;
    let mut all = Vec::new();
    loop {
        let mut buffer = [[0u8; SIGINFO_SIZE]; BATCH];
        let arguments = PeekSigInfo {
            offset: all.len() as u64,
            flags: u32::from(queue == Queue::Shared),
            count: BATCH as i32,
        };
        let got = request(
            libc::PTRACE_PEEKSIGINFO,
            tid,
            &raw const arguments as usize,
            buffer.as_mut_ptr() as usize,
        )? as usize;
        all.extend_from_slice(&buffer[..got]);
        if got < BATCH {
            return Ok(all);
        }
    }
}

/// The signal of the stop a task is in: after [`Event::Interrupted`] `SIGTRAP`, or that of job control which has stopped
/// its process.
pub fn stop_signal(tid: Pid) -> Result<i32> {
    let mut info: SignalInfo = [0; SIGINFO_SIZE];
    request(libc::PTRACE_GETSIGINFO, tid, 0, info.as_mut_ptr() as usize)?;
    let [a, b, c, d, ..] = info;
    Ok(i32::from_ne_bytes([a, b, c, d]))
}

/// Where a thread registered its restartable-sequences area (rseq(2), `struct ptrace_rseq_configuration`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RseqConfiguration {
    /// Address of the thread's `struct rseq`; 0 if none is registered.
    pub address: u64,
    /// Its registered size in bytes.
    pub size: u32,
    /// The signature before abort handlers.
    pub signature: u32,
    /// Registration flags.
    pub flags: u32,
    pad: u32,
}

/// Reads a stopped thread's rseq registration (`PTRACE_GET_RSEQ_CONFIGURATION`, Linux 5.13).
pub fn rseq(tid: Pid) -> Result<RseqConfiguration> {
    const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
    let mut configuration = RseqConfiguration::default();
    request(
        PTRACE_GET_RSEQ_CONFIGURATION,
        tid,
        size_of::<RseqConfiguration>(),
        &raw mut configuration as usize,
    )?;
    Ok(configuration)
}

/// Whether a stopped thread has a seccomp filter of this number, from 0 for the oldest (`PTRACE_SECCOMP_GET_METADATA`,
/// Linux 4.16). `EACCES`: the tracer has filters itself, or no `CAP_SYS_ADMIN`.
pub fn has_seccomp_filter(tid: Pid, number: u64) -> Result<bool> {
    const PTRACE_SECCOMP_GET_METADATA: u32 = 0x420d;
    /// `struct seccomp_metadata`: the number, and flags to be filled in.
    #[repr(C)]
    struct Metadata {
        number: u64,
        flags: u64,
    }
    let mut metadata = Metadata { number, flags: 0 };
    let size = size_of::<Metadata>();
    match request(
        PTRACE_SECCOMP_GET_METADATA,
        tid,
        size,
        &raw mut metadata as usize,
    ) {
        Ok(_) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Whether system calls of a stopped thread are dispatched to the program itself (`PR_SET_SYSCALL_USER_DISPATCH`;
/// `PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG`, Linux 6.4).
pub fn dispatches_calls(tid: Pid) -> Result<bool> {
    const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
    /// `struct ptrace_sud_config`: mode, address of the selector, offset and length of the code left alone.
    #[repr(C)]
    #[derive(Default)]
    struct Configuration {
        mode: u64,
        place: [u64; 3],
    }
    let mut found = Configuration::default();
    request(
        PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG,
        tid,
        size_of::<Configuration>(),
        &raw mut found as usize,
    )?;
    Ok(found.mode != 0)
}

/// The message of the last `PTRACE_EVENT_*` stop: the TID of the new task.
fn event_message(tid: Pid) -> Result<Pid> {
    let mut message: libc::c_ulong = 0;
    request(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut message as usize)?;
    Ok(Pid::from_raw(message as i32))
}

/// Looks, without waiting, whether the task has changed state. `None`: not yet.
pub fn poll(tid: Pid) -> io::Result<Option<Event>> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let got = unsafe { libc::waitpid(tid.as_raw(), &raw mut status, libc::__WALL | libc::WNOHANG) };
    if Errno::result(got)? == 0 {
        return Ok(None);
    }
    decode(tid, status).map(Some).map_err(io::Error::from)
}

/// Waits until the task changes state.
pub fn wait(tid: Pid) -> io::Result<Event> {
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call.
        match Errno::result(unsafe { libc::waitpid(tid.as_raw(), &raw mut status, libc::__WALL) }) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return decode(tid, status).map_err(io::Error::from),
        }
    }
}

/// Looks, without waiting, whether any child or tracee of this thread has changed state. None are left: `ECHILD`.
pub fn poll_any() -> io::Result<Option<(Pid, Event)>> {
    let mut status = 0;
    let options = libc::__WALL | libc::__WNOTHREAD | libc::WNOHANG;
    // SAFETY: `status` outlives the call.
    let got = unsafe { libc::waitpid(-1, &raw mut status, options) };
    match Errno::result(got)? {
        0 => Ok(None),
        pid => {
            let pid = Pid::from_raw(pid);
            let event = decode(pid, status).map_err(io::Error::from)?;
            Ok(Some((pid, event)))
        }
    }
}

fn decode(tid: Pid, status: i32) -> Result<Event> {
    if !libc::WIFSTOPPED(status) {
        return Ok(Event::Exited(status));
    }
    Ok(match status >> 16 {
        libc::PTRACE_EVENT_STOP => Event::Interrupted,
        libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK => {
            Event::Forked(event_message(tid)?)
        }
        0 => Event::Signal(libc::WSTOPSIG(status)),
        event => Event::Other(event),
    })
}
