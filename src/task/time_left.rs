//! Calls that wait for a time that is not over: sleeps, polls and futex waits that were told how long, and not until when.
//!
//! A rollback has such a thread make its call again with the time that was left, which the kernel alone knows
//! (`kernel::restart_block`).

use std::cell::OnceCell;
use std::sync::OnceLock;
use std::time::Duration;

use nix::unistd::Pid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::freeze::Stopped;
use crate::kernel::ptrace::Registers;
use crate::kernel::restart_block::{Block, Reader};
use crate::kernel::runner::goes_on_by_block;
use crate::record::{Context, Kind, ObjectId};

use super::Result;
use super::recorded::Recorded;

/// Prepares to read how much time is left, which takes some milliseconds: to be called before the tree is stopped.
pub fn prepare_time_left() {
    reader();
}

fn reader() -> Option<&'static Reader> {
    static READER: OnceLock<Option<Reader>> = OnceLock::new();
    let load = || {
        let loaded = Reader::load();
        loaded
            .inspect_err(
                |errno| tracing::info!(%errno, "calls that wait begin anew after a rollback"),
            )
            .ok()
    };
    READER.get_or_init(load).as_ref()
}

/// The payload of a record: how long the call of a thread was to wait still.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct TimeLeft {
    nanoseconds: u64,
}

/// A call with a time limit that counts from its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waits {
    Poll,
    Futex,
    Sleep,
    SleepByClock { since_boot: bool },
}

impl Waits {
    /// That of a thread in call `number`, if its time is not in its memory: relative sleeps may have what is left written
    /// over what they asked for.
    fn of(registers: &Registers, number: u64) -> Option<Self> {
        let Registers {
            rdi, rsi, rdx, r10, ..
        } = *registers;
        match number as libc::c_long {
            libc::SYS_poll => (rdx as i32 > 0).then_some(Self::Poll),
            libc::SYS_futex => {
                let operation = rsi as i32 & !libc::FUTEX_PRIVATE_FLAG;
                (operation == libc::FUTEX_WAIT && r10 != 0).then_some(Self::Futex)
            }
            libc::SYS_nanosleep => (rdi != rsi).then_some(Self::Sleep),
            libc::SYS_clock_nanosleep => {
                let since_boot = match rdi as i32 {
                    libc::CLOCK_REALTIME | libc::CLOCK_MONOTONIC => false,
                    libc::CLOCK_BOOTTIME => true,
                    _ => return None,
                };
                let is_relative = rsi as i32 & libc::TIMER_ABSTIME == 0 && rdx != r10;
                is_relative.then_some(Self::SleepByClock { since_boot })
            }
            _ => None,
        }
    }

    fn left(self, block: &Block<'_>) -> Duration {
        match self {
            Self::Poll => block.of_poll(),
            Self::Futex => block.of_futex(),
            Self::Sleep | Self::SleepByClock { since_boot: false } => block.of_sleep(),
            Self::SleepByClock { since_boot: true } => block.of_sleep_by_boot_time(),
        }
    }

    /// The registers for the call with another limit, which is at `address` too.
    fn call(self, registers: Registers, left: Duration, address: u64) -> Registers {
        match self {
            // It counts milliseconds; one that waits less is over too soon.
            Self::Poll => Registers {
                rdx: left.as_nanos().div_ceil(1_000_000) as u64,
                ..registers
            },
            Self::Futex => Registers {
                r10: address,
                ..registers
            },
            Self::Sleep => Registers {
                rdi: address,
                ..registers
            },
            Self::SleepByClock { .. } => Registers {
                rdx: address,
                ..registers
            },
        }
    }
}

/// The restart blocks of the threads of a process, read when the first is asked for.
pub(super) struct Blocks {
    pid: Pid,
    all: OnceCell<Vec<(Pid, Block<'static>)>>,
}

impl Blocks {
    pub(super) fn of(pid: Pid) -> Self {
        Self {
            pid,
            all: OnceCell::new(),
        }
    }

    fn get(&self, tid: Pid) -> Option<&Block<'static>> {
        let read = || {
            let read = reader().map(|reader| reader.read(self.pid));
            read.and_then(std::io::Result::ok).unwrap_or_default()
        };
        let all = self.all.get_or_init(read);
        all.iter().find(|of| of.0 == tid).map(|(_, block)| block)
    }
}

/// Records how long the call of a thread, whose record has the id `id`, was to wait still.
pub(super) fn capture(
    context: &mut Context,
    id: ObjectId,
    (tid, registers, number): (Pid, &Registers, u64),
    blocks: &Blocks,
) -> Result<()> {
    if !goes_on_by_block(registers) {
        return Ok(());
    }
    let Some(waits) = Waits::of(registers, number) else {
        return Ok(());
    };
    if let Some(block) = blocks.get(tid) {
        let left = waits.left(block).as_nanos() as u64;
        let record = TimeLeft { nanoseconds: left };
        context.put(Kind::TimeLeft, id, &record, b"")?;
    }
    Ok(())
}

/// What is left to wait of a recorded thread's call; `None`: it waits for ever, until a certain time, not at all, or nobody knows.
pub(super) fn read(context: &Context, id: ObjectId) -> Result<Option<Duration>> {
    let Some(record) = context.find(Kind::TimeLeft, id) else {
        return Ok(None);
    };
    let (left, _) = record.fixed::<TimeLeft>()?;
    Ok(Some(Duration::from_nanos(left.nanoseconds)))
}

/// Has the threads of a tree that is as recorded wait on for as long as was left, each in its call. To be called last: until
/// they run on, nothing may run in them.
pub fn wait_on(stopped: &mut Stopped<'_>, recorded: &Recorded<'_>) -> Result<()> {
    for process in recorded.processes() {
        for thread in process.threads.values() {
            let Some(left) = thread.time_left else {
                continue;
            };
            let registers = thread.registers();
            let Some(waits) = Waits::of(&registers, registers.rax) else {
                continue;
            };
            let time = [left.as_secs(), u64::from(left.subsec_nanos())];
            let whom = (process.pid(), thread.tid());
            stopped.wait_in_call(whom, time.as_bytes(), |registers, address| {
                waits.call(registers, left, address)
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::registers::{WORDS, from_words};

    fn with(rdi: u64, rsi: u64, rdx: u64, r10: u64) -> Registers {
        Registers {
            rdi,
            rsi,
            rdx,
            r10,
            ..from_words(&[0; WORDS])
        }
    }

    #[test]
    fn only_limits_that_count_from_the_beginning() {
        let of = |number: libc::c_long, registers| Waits::of(&registers, number as u64);
        assert_eq!(of(libc::SYS_poll, with(1, 1, 500, 0)), Some(Waits::Poll));
        assert_eq!(of(libc::SYS_poll, with(1, 1, u64::from(u32::MAX), 0)), None);
        let futex = |operation: i32, time| of(libc::SYS_futex, with(64, operation as u64, 0, time));
        assert_eq!(futex(libc::FUTEX_WAIT, 64), Some(Waits::Futex));
        let private = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
        assert_eq!(futex(private, 64), Some(Waits::Futex));
        assert_eq!(futex(libc::FUTEX_WAIT, 0), None);
        assert_eq!(futex(libc::FUTEX_WAIT_BITSET, 64), None);
        assert_eq!(
            of(libc::SYS_nanosleep, with(64, 0, 0, 0)),
            Some(Waits::Sleep)
        );
        assert_eq!(of(libc::SYS_nanosleep, with(64, 64, 0, 0)), None);
        let sleep = |clock: i32, flags: i32, rest| {
            of(
                libc::SYS_clock_nanosleep,
                with(clock as u64, flags as u64, 64, rest),
            )
        };
        let by_clock = |since_boot| Some(Waits::SleepByClock { since_boot });
        assert_eq!(sleep(libc::CLOCK_REALTIME, 0, 0), by_clock(false));
        assert_eq!(sleep(libc::CLOCK_BOOTTIME, 0, 128), by_clock(true));
        assert_eq!(sleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, 0), None);
        assert_eq!(sleep(libc::CLOCK_MONOTONIC, 0, 64), None);
        assert_eq!(sleep(libc::CLOCK_PROCESS_CPUTIME_ID, 0, 0), None);
    }

    #[test]
    fn a_poll_never_waits_too_short() {
        let poll = |left| {
            Waits::Poll
                .call(with(1, 1, 500, 0), Duration::from_nanos(left), 4096)
                .rdx
        };
        assert_eq!((poll(1), poll(1_000_000), poll(1_000_001)), (1, 1, 2));
        let sleep = Waits::Sleep.call(with(1, 2, 3, 4), Duration::from_secs(1), 4096);
        assert_eq!(
            (sleep.rdi, sleep.rsi, sleep.rdx, sleep.r10),
            (4096, 2, 3, 4)
        );
    }
}
