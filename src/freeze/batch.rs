//! Batches: system calls and memory copies for a stopped thread to execute in one go, as data.

use std::ops::Range;

use nix::errno::Errno;

use crate::kernel::runner::{OP_CALL, OP_COPY, REQUIRED, Step};

/// Most steps a batch may have.
pub const MOST_STEPS: usize = 7000;
/// Most bytes of input and output a batch may have.
pub const MOST_DATA: usize = 512 << 10;

/// An argument of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// A plain value.
    Value(u64),
    /// The address, in the target, of a place in the batch's data.
    Data(usize),
    /// What an earlier step returned.
    Result(StepId),
    /// The value that will be at a place in the batch's data when the step runs, as a descriptor that an earlier
    /// step stored there.
    Stored(usize),
}

macro_rules! value {
    ($($integer:ty)*) => { $(impl From<$integer> for Arg {
        fn from(value: $integer) -> Self {
            Self::Value(value as u64)
        }
    })* };
}
value!(u64 i64 u32 i32 usize);

/// Names a step of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepId(usize);

impl From<StepId> for Arg {
    fn from(step: StepId) -> Self {
        Self::Result(step)
    }
}

/// Room that a batch's steps fill and its maker reads afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output(Range<usize>);

impl Output {
    /// Its address in the target.
    pub fn arg(&self) -> Arg {
        Arg::Data(self.0.start)
    }

    /// The address of byte `offset` of it.
    pub fn at(&self, offset: usize) -> Arg {
        assert!(offset <= self.0.len());
        Arg::Data(self.0.start + offset)
    }

    /// The 64-bit value that will be at byte `offset` (a multiple of 8).
    pub fn stored(&self, offset: usize) -> Arg {
        assert!(offset + 8 <= self.0.len() && offset.is_multiple_of(8));
        Arg::Stored(self.0.start + offset)
    }
}

#[derive(Debug, Clone)]
struct Planned {
    op: u32,
    required: bool,
    number: u64,
    /// Those not given are 0, as the runner loads all of them.
    arguments: [Arg; 6],
}

/// Steps to be executed in order by one thread of a target.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    steps: Vec<Planned>,
    data: Vec<u8>,
    /// Offsets into `data`: there stands the address of the other place.
    pointers: Vec<(usize, usize)>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether it has no steps.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Number of steps.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether `steps` more steps and `data` more bytes still fit.
    pub fn has_room(&self, steps: usize, data: usize) -> bool {
        self.steps.len() + steps <= MOST_STEPS && self.data.len() + data + 8 <= MOST_DATA
    }

    /// Places bytes where the target can read them; 8-byte aligned.
    pub fn input(&mut self, bytes: &[u8]) -> Arg {
        let at = self.data.len();
        self.data.extend_from_slice(bytes);
        self.align();
        Arg::Data(at)
    }

    /// Makes zeroed room for `len` bytes of results; 8-byte aligned.
    pub fn output(&mut self, len: usize) -> Output {
        let at = self.data.len();
        self.data.resize(at + len, 0);
        self.align();
        Output(at..at + len)
    }

    /// Room for results that begins as these bytes; 8-byte aligned.
    pub fn filled(&mut self, bytes: &[u8]) -> Output {
        let at = self.data.len();
        self.data.extend_from_slice(bytes);
        self.align();
        Output(at..at + bytes.len())
    }

    /// Has byte `offset` (a multiple of 8) of `holder` hold the address of `pointee` when the batch starts.
    pub fn point(&mut self, holder: &Output, offset: usize, pointee: &Output) {
        assert!(offset + 8 <= holder.0.len() && offset.is_multiple_of(8));
        self.pointers
            .push((holder.0.start + offset, pointee.0.start));
    }

    fn align(&mut self) {
        self.data.resize(self.data.len().next_multiple_of(8), 0);
    }

    fn push(&mut self, op: u32, number: u64, arguments: &[Arg]) -> StepId {
        assert!(arguments.len() <= 6, "a step has at most six arguments");
        for argument in arguments {
            if let Arg::Result(StepId(step)) = argument {
                assert!(*step < self.steps.len(), "refers to a later step");
            }
        }
        let mut all = [Arg::Value(0); 6];
        all[..arguments.len()].copy_from_slice(arguments);
        self.steps.push(Planned {
            op,
            required: false,
            number,
            arguments: all,
        });
        StepId(self.steps.len() - 1)
    }

    /// Adds a system call.
    pub fn call(&mut self, number: libc::c_long, arguments: &[Arg]) -> StepId {
        self.push(OP_CALL, number as u64, arguments)
    }

    /// Adds a copy of `len` bytes inside the target.
    pub fn copy(&mut self, to: Arg, from: Arg, len: usize) -> StepId {
        self.push(OP_COPY, 0, &[to, from, len.into()])
    }

    /// If this call fails the steps after it are skipped; their result is `ECANCELED`.
    pub fn must_succeed(&mut self, step: StepId) {
        self.steps[step.0].required = true;
    }

    /// The steps as the runner reads them, for steps at `steps_at` and data at `data_at` in the target.
    pub(super) fn encode(&self, steps_at: u64, data_at: u64) -> Vec<Step> {
        let result_of = |step: usize| {
            steps_at + (step * size_of::<Step>() + std::mem::offset_of!(Step, result)) as u64
        };
        let encode = |planned: &Planned| {
            let mut step = Step {
                op: planned.op,
                flags: if planned.required { REQUIRED } else { 0 },
                number: planned.number,
                result: -(Errno::ECANCELED as i64) as u64,
                ..Step::default()
            };
            for (index, argument) in planned.arguments.iter().enumerate() {
                let (value, indirect) = match *argument {
                    Arg::Value(value) => (value, false),
                    Arg::Data(offset) => (data_at + offset as u64, false),
                    Arg::Result(StepId(earlier)) => (result_of(earlier), true),
                    Arg::Stored(offset) => (data_at + offset as u64, true),
                };
                step.arguments[index] = value;
                step.flags |= u32::from(indirect) << index;
            }
            step
        };
        self.steps.iter().map(encode).collect()
    }

    /// The data as it is to be placed at `data_at` in the target.
    pub(super) fn data(&self, data_at: u64) -> Vec<u8> {
        let mut data = self.data.clone();
        for (holder, pointee) in &self.pointers {
            data[*holder..holder + 8].copy_from_slice(&(data_at + *pointee as u64).to_ne_bytes());
        }
        data
    }
}

/// What a batch returned.
#[derive(Debug, Clone)]
pub struct Outputs {
    pub(super) results: Vec<u64>,
    pub(super) data: Vec<u8>,
    /// How the step failed that cut the batch short, one of those that must succeed.
    pub cut_short: Option<Errno>,
    /// Processes that the batch's steps made; they are seized and stopped.
    pub born: Vec<nix::unistd::Pid>,
}

/// The error in what a system call returned, if it is one.
pub(super) fn failure(result: u64) -> Option<Errno> {
    (result > -4096i64 as u64).then(|| Errno::from_raw(-(result as i64) as i32))
}

impl Outputs {
    /// What the step returned.
    pub fn result(&self, step: StepId) -> Result<u64, Errno> {
        let raw = self.results[step.0];
        failure(raw).map_or(Ok(raw), Err)
    }

    /// The bytes of an output.
    pub fn bytes(&self, output: &Output) -> &[u8] {
        &self.data[output.0.clone()]
    }

    /// The first step that failed, and how.
    pub fn first_failure(&self) -> Option<(usize, Errno)> {
        (0..self.results.len())
            .find_map(|step| self.result(StepId(step)).err().map(|errno| (step, errno)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_data_become_addresses() {
        let mut batch = Batch::new();
        let path = batch.input(b"/tmp\0");
        let out = batch.output(144);
        let fd = batch.call(
            libc::SYS_openat,
            &[Arg::from(libc::AT_FDCWD), path, Arg::from(0)],
        );
        let stat = batch.call(libc::SYS_fstat, &[fd.into(), out.arg()]);
        batch.must_succeed(stat);
        let steps = batch.encode(0x1000, 0x9000);
        assert_eq!(steps[0].arguments[0], libc::AT_FDCWD as u64);
        assert_eq!(steps[0].arguments[1], 0x9000);
        assert_eq!(steps[1].arguments, [0x1000 + 64, 0x9008, 0, 0, 0, 0]);
        assert_eq!(steps[1].flags, 1 | REQUIRED);
    }

    #[test]
    fn failures_are_errnos() {
        let outputs = Outputs {
            results: vec![3, -2i64 as u64],
            data: vec![],
            cut_short: None,
            born: vec![],
        };
        assert_eq!(outputs.result(StepId(0)), Ok(3));
        assert_eq!(outputs.result(StepId(1)), Err(Errno::ENOENT));
        assert_eq!(outputs.first_failure(), Some((1, Errno::ENOENT)));
    }
}
