//! How long system calls that were interrupted were to wait still: the kernel notes it in each task (`include/linux/restart_block.h`)
//! and shows it nowhere, so it is read by a BPF iterator over tasks.

use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::bpf::{self, Instruction, step};
use super::bpf_iterator::{Of, Program};
use super::btf;

/// Words of `struct restart_block`.
const WORDS: usize = 7;

/// The loaded program, and where in a restart block what is.
#[derive(Debug)]
pub struct Reader {
    program: Program,
    futex: usize,
    sleep: usize,
    poll: usize,
}

/// What the program writes of a task.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Written {
    block: [u64; WORDS],
    monotonic: u64,
    since_boot: u64,
    /// `task_struct.pid` and the member after it.
    tid: [u32; 2],
}

/// The restart block of a thread, of which it must be known what call left it.
#[derive(Debug, Clone, Copy)]
pub struct Block<'r> {
    reader: &'r Reader,
    written: Written,
}

const SIZE: i16 = size_of::<Written>() as i16;
const BLOCK_SIZE: i16 = 8 * WORDS as i16;

/// `struct bpf_iter__task` is meta, task.
fn program(block: i16, tid: i16) -> Vec<Instruction> {
    let zeroes = (0..SIZE / 8).map(|word| step(bpf::STORE_NUMBER, 10, 0, word * 8 - SIZE, 0));
    let mut program = vec![
        step(bpf::MOVE, 6, 1, 0, 0),
        step(bpf::LOAD, 7, 6, 8, 0),
        step(bpf::LOAD, 8, 6, 0, 0),
        step(bpf::LOAD, 8, 8, 0, 0),
    ];
    program.extend(zeroes);
    let of_task = [
        step(bpf::MOVE, 1, 10, 0, 0),
        step(bpf::ADD_NUMBER, 1, 0, 0, -i32::from(SIZE)),
        step(bpf::MOVE_NUMBER, 2, 0, 0, i32::from(BLOCK_SIZE)),
        step(bpf::MOVE, 3, 7, 0, 0),
        step(bpf::ADD_NUMBER, 3, 0, 0, i32::from(block)),
        step(bpf::CALL, 0, 0, 0, bpf::PROBE_READ_KERNEL),
        step(bpf::CALL, 0, 0, 0, bpf::KTIME_GET_NS),
        step(bpf::STORE, 10, 0, -24, 0),
        step(bpf::CALL, 0, 0, 0, bpf::KTIME_GET_BOOT_NS),
        step(bpf::STORE, 10, 0, -16, 0),
        step(bpf::MOVE, 1, 10, 0, 0),
        step(bpf::ADD_NUMBER, 1, 0, 0, -8),
        step(bpf::MOVE_NUMBER, 2, 0, 0, 4),
        step(bpf::MOVE, 3, 7, 0, 0),
        step(bpf::ADD_NUMBER, 3, 0, 0, i32::from(tid)),
        step(bpf::CALL, 0, 0, 0, bpf::PROBE_READ_KERNEL),
    ];
    // It is called without a task at the end: then zeroes are written.
    program.push(step(bpf::JUMP_IF_IS, 7, 0, of_task.len() as i16, 0));
    program.extend(of_task);
    program.extend([
        step(bpf::MOVE, 1, 8, 0, 0),
        step(bpf::MOVE, 2, 10, 0, 0),
        step(bpf::ADD_NUMBER, 2, 0, 0, -i32::from(SIZE)),
        step(bpf::MOVE_NUMBER, 3, 0, 0, i32::from(SIZE)),
        step(bpf::CALL, 0, 0, 0, bpf::SEQ_WRITE),
        step(bpf::MOVE_NUMBER, 0, 0, 0, 0),
        step(bpf::EXIT, 0, 0, 0, 0),
    ]);
    program
}

impl Reader {
    /// Loads the program. Takes some milliseconds.
    ///
    /// # Errors
    ///
    /// This kernel has no such iterator or tells nothing of its types, or we may not (`CAP_BPF`, `CAP_PERFMON`).
    pub fn load() -> Result<Self, Errno> {
        let types = btf::Types::of_kernel().ok_or(Errno::ENOENT)?;
        let word = |path: &[&str]| {
            let offset = types.offset_along("restart_block", path)?;
            Some(offset as usize / 8).filter(|word| *word < WORDS)
        };
        let places = || {
            let [sec, nsec] = ["tv_sec", "tv_nsec"].map(|name| word(&["poll", name]));
            let (poll, nsec) = (sec?, nsec?);
            let block = types.offset("task_struct", "restart_block")?;
            let tid = types.offset("task_struct", "pid")?;
            let (futex, sleep) = (word(&["futex", "time"])?, word(&["nanosleep", "expires"])?);
            (nsec == poll + 1).then_some((program(block, tid), futex, sleep, poll))
        };
        let (instructions, futex, sleep, poll) = places().ok_or(Errno::ENOSYS)?;
        Ok(Self {
            program: Program::load(&types, "bpf_iter_task", &instructions)?,
            futex,
            sleep,
            poll,
        })
    }

    /// Reads the restart blocks of all threads of a process, by TID in the initial PID namespace.
    ///
    /// # Errors
    ///
    /// It is gone, or this kernel can't look at a single process.
    pub fn read(&self, pid: Pid) -> std::io::Result<Vec<(Pid, Block<'_>)>> {
        let of = Of::Process(pid.as_raw());
        let written = self.program.read(of, |task: &Written| task.tid[0] == 0)?;
        let block = |written: Written| {
            let tid = Pid::from_raw(written.tid[0] as i32);
            let reader = self;
            (tid, Block { reader, written })
        };
        Ok(written.into_iter().map(block).collect())
    }
}

impl Block<'_> {
    /// What is left to wait in a futex(2).
    pub fn of_futex(&self) -> Duration {
        left(
            self.written.block[self.reader.futex],
            self.written.monotonic,
        )
    }

    /// What is left to sleep by `CLOCK_MONOTONIC`, which relative sleeps by `CLOCK_REALTIME` go by too.
    pub fn of_sleep(&self) -> Duration {
        left(
            self.written.block[self.reader.sleep],
            self.written.monotonic,
        )
    }

    /// What is left to sleep by `CLOCK_BOOTTIME`.
    pub fn of_sleep_by_boot_time(&self) -> Duration {
        left(
            self.written.block[self.reader.sleep],
            self.written.since_boot,
        )
    }

    /// What is left to wait in a poll(2).
    pub fn of_poll(&self) -> Duration {
        const SECOND: u64 = 1_000_000_000;
        let at = self.reader.poll;
        let [seconds, nanoseconds] = [at, at + 1].map(|word| self.written.block[word]);
        let end = seconds.saturating_mul(SECOND).saturating_add(nanoseconds);
        left(end, self.written.monotonic)
    }
}

fn left(end: u64, now: u64) -> Duration {
    Duration::from_nanos(end.saturating_sub(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_threads_are_there() {
        let reader = match Reader::load() {
            Ok(reader) => reader,
            Err(errno @ (Errno::EPERM | Errno::ENOSYS | Errno::ENOENT)) => {
                println!("SKIP no BPF iterators: {errno}");
                return;
            }
            Err(errno) => panic!("{errno}"),
        };
        let found = reader.read(Pid::this()).unwrap();
        let me = nix::unistd::gettid();
        assert!(found.iter().any(|(tid, _)| *tid == Pid::this()));
        let (_, own) = found.iter().find(|(tid, _)| *tid == me).unwrap();
        assert_ne!(own.written.monotonic, 0);
        assert!(own.written.since_boot >= own.written.monotonic);
    }

    #[test]
    fn time_that_is_over_leaves_nothing() {
        assert_eq!(left(7, 5), Duration::from_nanos(2));
        assert_eq!(left(5, 7), Duration::ZERO);
    }
}
