//! Looks at the tables of a stopped tree: which numbers are open, what all kinds have, which are the same description.
//!
//! The hot path of a rollback. Per table one listing of `/proc/PID/fd` and one batch in the target; per number five or six
//! system calls of the target, and a kcmp(2) only where two numbers may be the same description.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use nix::errno::Errno;
use nix::unistd::Pid;

use super::Error;
use super::live::{Glance, Holder};
use super::model::{Common, ObjectId, Owner, Place, Slot, Table};
use crate::freeze::{Arg, Batch, Output, Outputs, StepId, Stopped};
use crate::kernel::kcmp;

/// What to ask of a number beyond its flags and stat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// All that any kind may have.
    All,
    /// Position.
    File,
    /// Capacity and content.
    Pipe,
    /// Cookie.
    Socket,
    /// Nothing.
    Nothing,
}

/// What is known of a number before it is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// The description that was recorded there, and what all kinds have of it.
    pub is: Option<(ObjectId, Common)>,
    /// What to ask.
    pub ask: Ask,
    /// Whether to ask which signal its owner gets. Who that is, is always asked: sockets send `SIGURG` whatever their flags.
    pub signal: bool,
}

impl Expected {
    /// Nothing is known.
    pub const NOTHING: Self = Self {
        is: None,
        ask: Ask::All,
        signal: true,
    };
}

/// One number as found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sighting {
    /// Where.
    pub place: Place,
    /// `FD_CLOEXEC`.
    pub close_on_exec: bool,
    /// What all kinds have.
    pub common: Common,
    /// Who gets `SIGIO`, and by which signal; `None` is nobody, by `SIGIO`.
    pub owner: Option<Owner>,
    /// What was asked of a socket or pipe.
    pub glance: Glance,
    /// What was recorded there.
    pub expected: Option<ObjectId>,
}

/// All numbers of a tree, with those that are one description told.
#[derive(Debug, Default)]
pub struct Survey {
    /// Tables: which descriptions are at which numbers, by index into `descriptions`.
    pub tables: Vec<Table<usize>>,
    /// One sighting of each description.
    pub descriptions: Vec<Sighting>,
    /// `RLIMIT_NOFILE` (soft) of the first holder of each table.
    pub limits: Vec<u64>,
}

/// `struct stat` on x86-64.
const STAT_SIZE: usize = size_of::<libc::stat>();
/// Steps asked per number at most.
const STEPS: usize = 9;
/// Bytes of results per number at most.
const DATA: usize = STAT_SIZE + 8 * 4;
const SO_COOKIE: i32 = 57;

struct Asked {
    fd: i32,
    expected: Expected,
    flags: StepId,
    status: StepId,
    stat: StepId,
    stat_room: Output,
    position: Option<StepId>,
    owner: (StepId, Output),
    signal: Option<StepId>,
    cookie: Option<(StepId, Output)>,
    unread: Option<(StepId, Output)>,
    capacity: Option<StepId>,
}

fn ask(batch: &mut Batch, fd: i32, expected: Expected) -> Asked {
    let fcntl = |batch: &mut Batch, command: i32, argument: Arg| {
        batch.call(libc::SYS_fcntl, &[fd.into(), command.into(), argument])
    };
    let flags = fcntl(batch, libc::F_GETFD, 0.into());
    let status = fcntl(batch, libc::F_GETFL, 0.into());
    let stat_room = batch.output(STAT_SIZE);
    let stat = batch.call(libc::SYS_fstat, &[fd.into(), stat_room.arg()]);
    let position = matches!(expected.ask, Ask::All | Ask::File).then(|| {
        let arguments = [fd.into(), 0.into(), libc::SEEK_CUR.into()];
        batch.call(libc::SYS_lseek, &arguments)
    });
    let room = batch.output(8);
    let owner = (fcntl(batch, F_GETOWN_EX, room.arg()), room);
    let signal = expected.signal.then(|| fcntl(batch, F_GETSIG, 0.into()));
    let is_pipe = expected.ask == Ask::Pipe;
    let capacity = is_pipe.then(|| fcntl(batch, libc::F_GETPIPE_SZ, 0.into()));
    let unread = is_pipe.then(|| {
        let room = batch.output(8);
        let arguments = [fd.into(), libc::FIONREAD.into(), room.arg()];
        (batch.call(libc::SYS_ioctl, &arguments), room)
    });
    let cookie = (expected.ask == Ask::Socket).then(|| {
        let room = batch.output(8);
        let len = batch.input(&8u32.to_ne_bytes());
        let arguments = [
            fd.into(),
            libc::SOL_SOCKET.into(),
            SO_COOKIE.into(),
            room.arg(),
            len,
        ];
        (batch.call(libc::SYS_getsockopt, &arguments), room)
    });
    Asked {
        fd,
        expected,
        flags,
        status,
        stat,
        stat_room,
        position,
        owner,
        signal,
        cookie,
        unread,
        capacity,
    }
}

const F_GETSIG: i32 = 11;
const F_GETOWN_EX: i32 = 16;

fn word(bytes: &[u8]) -> u64 {
    bytes
        .first_chunk()
        .map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

fn int(bytes: &[u8]) -> i32 {
    bytes
        .first_chunk()
        .map_or(0, |bytes| i32::from_ne_bytes(*bytes))
}

impl Asked {
    fn read_owner(&self, outputs: &Outputs) -> Option<Owner> {
        let (asked, room) = &self.owner;
        // O_PATH descriptors have none.
        outputs.result(*asked).ok()?;
        let bytes = outputs.bytes(room);
        let (kind, id) = (int(bytes), int(&bytes[4..]));
        let signal = self.signal.and_then(|step| outputs.result(step).ok());
        let signal = signal.map_or(0, |signal| signal as i32);
        (id != 0 || signal != 0).then_some(Owner {
            kind: if id == 0 { Owner::NOBODY.kind } else { kind },
            id,
            signal,
        })
    }

    fn read(&self, pid: i32, outputs: &Outputs) -> Result<Sighting, Error> {
        let must = |step, call| {
            outputs.result(step).map_err(|errno| Error::Descriptor {
                what: format!("fd {}", self.fd),
                pid,
                call,
                errno,
            })
        };
        let optional = |asked: &Option<(StepId, Output)>| match asked {
            Some((step, room)) if outputs.result(*step).is_ok() => Some(word(outputs.bytes(room))),
            _ => None,
        };
        let count = |asked| optional(asked).map(|value| value as u32 as usize);
        must(self.stat, "fstat")?;
        let stat = outputs.bytes(&self.stat_room);
        let field = |offset: usize| word(&stat[offset..]);
        let owner = self.read_owner(outputs);
        let offset = match (self.position, self.expected.is) {
            (Some(step), _) => outputs.result(step).map_or(-1, |position| position as i64),
            (None, Some((_, then))) => then.offset,
            (None, None) => -1,
        };
        Ok(Sighting {
            place: Place { pid, fd: self.fd },
            close_on_exec: must(self.flags, "F_GETFD")? & libc::FD_CLOEXEC as u64 != 0,
            common: Common {
                flags: must(self.status, "F_GETFL")? as i32,
                offset,
                dev: field(std::mem::offset_of!(libc::stat, st_dev)),
                ino: field(std::mem::offset_of!(libc::stat, st_ino)),
                mode: int(&stat[std::mem::offset_of!(libc::stat, st_mode)..]) as u32,
                rdev: field(std::mem::offset_of!(libc::stat, st_rdev)),
            },
            owner,
            glance: Glance {
                cookie: optional(&self.cookie),
                unread: count(&self.unread),
                capacity: self
                    .capacity
                    .and_then(|step| outputs.result(step).ok())
                    .map(|bytes| bytes as usize),
            },
            expected: self.expected.is.map(|(id, _)| id),
        })
    }
}

/// The open numbers of a process, ascending.
pub fn numbers(pid: i32) -> Result<Vec<i32>, Error> {
    let path = format!("/proc/{pid}/fd");
    let text = |problem: String| Error::Text {
        path: path.clone(),
        problem,
    };
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(&path).map_err(|error| text(error.to_string()))? {
        let name = entry.map_err(|error| text(error.to_string()))?.file_name();
        let number = name.to_str().and_then(|name| name.parse().ok());
        numbers.push(number.ok_or_else(|| text(format!("{name:?} is not a number")))?);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// How many numbers of a process are open: the size of `/proc/PID/fd` (Linux 6.2). `None` if the kernel does not tell.
fn open_count(stopped: &Stopped<'_>, pid: i32) -> Option<usize> {
    let numbers = &stopped.member(Pid::from_raw(pid)).ok()?.numbers;
    let count = numbers.metadata().ok()?.len();
    usize::try_from(count).ok().filter(|count| *count > 0)
}

/// What was found of one table, and its `RLIMIT_NOFILE`.
type Look = (Vec<Sighting>, u64);

/// Questions to one table, as steps of a batch.
pub struct Questions {
    limit: Output,
    asked: Vec<Asked>,
}

impl Questions {
    /// Adds questions about as many of `numbers` as have room in a batch.
    pub fn add(
        batch: &mut Batch,
        numbers: &mut impl Iterator<Item = i32>,
        expected: impl Fn(i32) -> Expected,
    ) -> Self {
        let limit = batch.output(16);
        batch.call(
            libc::SYS_getrlimit,
            &[libc::RLIMIT_NOFILE.into(), limit.arg()],
        );
        let mut asked = Vec::new();
        while batch.has_room(STEPS, DATA)
            && let Some(fd) = numbers.next()
        {
            asked.push(ask(batch, fd, expected(fd)));
        }
        Self { limit, asked }
    }

    /// How many numbers it asks about.
    pub fn len(&self) -> usize {
        self.asked.len()
    }

    /// Whether it asks about no number.
    pub fn is_empty(&self) -> bool {
        self.asked.is_empty()
    }

    /// Adds what the batch found to `look`; false if one of the numbers is closed.
    fn read(&self, pid: i32, outputs: &Outputs, look: &mut Look) -> Result<bool, Error> {
        look.1 = word(outputs.bytes(&self.limit));
        for asked in &self.asked {
            if outputs.result(asked.flags) == Err(Errno::EBADF) {
                return Ok(false);
            }
            look.0.push(asked.read(pid, outputs)?);
        }
        Ok(true)
    }
}

/// Questions about all the numbers of a table that are likely to be open, and the outputs of the batch that they were in.
pub type Answers<'a> = (&'a Questions, &'a Outputs);

/// Looks at all numbers of one table. If as many are open as are expected, those are looked at first, and unless one of
/// them turns out to be closed there is no need to list them. `answers` are what was asked about those already.
fn look(
    stopped: &mut Stopped<'_>,
    pid: i32,
    guess: &[i32],
    expected: impl Fn(i32) -> Expected,
    answers: Option<Answers<'_>>,
) -> Result<Look, Error> {
    if open_count(stopped, pid) == Some(guess.len())
        && let Some(found) = look_at(stopped, pid, guess, &expected, answers)?
    {
        return Ok(found);
    }
    look_at(stopped, pid, &numbers(pid)?, &expected, None)?.ok_or_else(|| Error::Descriptor {
        what: "an open number".into(),
        pid,
        call: "F_GETFD",
        errno: Errno::EBADF,
    })
}

/// Looks at some numbers of a table; `None` if one of them is closed.
fn look_at(
    stopped: &mut Stopped<'_>,
    pid: i32,
    numbers: &[i32],
    expected: impl Fn(i32) -> Expected,
    answers: Option<Answers<'_>>,
) -> Result<Option<Look>, Error> {
    let mut look = (Vec::with_capacity(numbers.len()), u64::MAX);
    match answers.filter(|(questions, _)| questions.len() == numbers.len()) {
        Some((questions, outputs)) => {
            if !questions.read(pid, outputs, &mut look)? {
                return Ok(None);
            }
        }
        None => {
            let mut rest = numbers.iter().copied().peekable();
            loop {
                let mut batch = Batch::new();
                let questions = Questions::add(&mut batch, &mut rest, &expected);
                let outputs = stopped.run(Pid::from_raw(pid), &batch)?;
                if !questions.read(pid, &outputs, &mut look)? {
                    return Ok(None);
                }
                if rest.peek().is_none() {
                    break;
                }
            }
        }
    }
    let is_stranger = |sighting: &Sighting| {
        let is_expected = |(_, then): (_, Common)| {
            then.file_type() == sighting.common.file_type()
                && then.flags & libc::O_PATH == sighting.common.flags & libc::O_PATH
        };
        !expected(sighting.place.fd).is.is_none_or(is_expected)
    };
    let strangers: Vec<usize> = (0..look.0.len())
        .filter(|index| is_stranger(&look.0[*index]))
        .collect();
    // Something of another type is there than was recorded: other questions.
    for index in strangers {
        let fd = look.0[index].place.fd;
        let mut batch = Batch::new();
        let expected = expected(fd);
        let asked = ask(
            &mut batch,
            fd,
            Expected {
                ask: Ask::All,
                signal: true,
                ..expected
            },
        );
        let outputs = stopped.run(Pid::from_raw(pid), &batch)?;
        look.0[index] = asked.read(pid, &outputs)?;
    }
    Ok(Some(look))
}

/// The file tables of these processes: which of them share one.
pub fn sharing(holders: &BTreeMap<i32, Holder>) -> Result<Vec<Vec<i32>>, Error> {
    let mut tables: Vec<Vec<i32>> = Vec::new();
    for &pid in holders.keys() {
        let mut failed = None;
        let found = tables.binary_search_by(|table| {
            kcmp::tables(Pid::from_raw(table[0]), Pid::from_raw(pid)).unwrap_or_else(|errno| {
                failed = Some(errno);
                Ordering::Less
            })
        });
        if let Some(errno) = failed {
            return Err(Error::Descriptor {
                what: "file table".into(),
                pid,
                call: "kcmp",
                errno,
            });
        }
        match found {
            Ok(index) => tables[index].push(pid),
            Err(index) => tables.insert(index, vec![pid]),
        }
    }
    tables.sort();
    Ok(tables)
}

/// Looks at the given tables, each named by the processes that share it; `guess` are the numbers that are likely to be
/// open, `answers` what was asked about those already. Tables for which `is_gone` says so are taken to be empty.
pub fn survey<'a>(
    stopped: &mut Stopped<'_>,
    tables: &[Vec<i32>],
    guess: impl Fn(usize) -> Vec<i32>,
    is_gone: impl Fn(usize) -> bool,
    expected: impl Fn(usize, i32) -> Expected,
    answers: impl Fn(usize) -> Option<Answers<'a>>,
) -> Result<Survey, Error> {
    let mut all = Vec::new();
    let mut survey = Survey::default();
    for (index, holders) in tables.iter().enumerate() {
        let (sightings, limit) = match is_gone(index) {
            true => (Vec::new(), u64::MAX),
            false => look(
                stopped,
                holders[0],
                &guess(index),
                |fd| expected(index, fd),
                answers(index),
            )?,
        };
        survey.limits.push(limit);
        all.extend(sightings.into_iter().map(|sighting| (index, sighting)));
        survey.tables.push(Table {
            holders: holders.clone(),
            slots: Vec::new(),
        });
    }
    let of = group(
        &all.iter()
            .map(|(_, sighting)| *sighting)
            .collect::<Vec<_>>(),
        compare,
    )?;
    for ((table, sighting), group) in all.into_iter().zip(of) {
        if group == survey.descriptions.len() {
            survey.descriptions.push(sighting);
        }
        survey.tables[table].slots.push(Slot {
            fd: sighting.place.fd,
            close_on_exec: sighting.close_on_exec,
            description: group,
        });
    }
    Ok(survey)
}

/// Compares two descriptions by kcmp(2).
pub(super) fn compare(one: Place, other: Place) -> Result<Ordering, Error> {
    let at = |place: Place| (Pid::from_raw(place.pid), place.fd);
    kcmp::files(at(one), at(other)).map_err(|errno| Error::Descriptor {
        what: format!("fd {}", one.fd),
        pid: one.pid,
        call: "kcmp",
        errno,
    })
}

/// Which sightings are the same description: numbers from 0 in the order of their first sightings.
///
/// Only sightings that look the same in all that a description has are compared. Those recorded as the same are expected
/// to be, and different ones to be in the order of their ids, so that a tree in which nothing changed costs one comparison
/// per sighting.
fn group(
    sightings: &[Sighting],
    compare: impl Fn(Place, Place) -> Result<Ordering, Error>,
) -> Result<Vec<usize>, Error> {
    let look = |index: usize| {
        let common = sightings[index].common;
        (
            common.dev,
            common.ino,
            common.flags,
            common.offset,
            common.mode,
        )
    };
    let mut order: Vec<usize> = (0..sightings.len()).collect();
    order.sort_by_key(|&index| {
        let expected = sightings[index].expected;
        (look(index), expected.is_none(), expected, index)
    });
    // The representative of each sighting: its own index, or that of one that is the same.
    let mut same: Vec<usize> = (0..sightings.len()).collect();
    for members in order.chunk_by(|&a, &b| look(a) == look(b)) {
        // Ascending in the order of the comparison; the last one that was found or added is tried first.
        let mut distinct: Vec<usize> = Vec::new();
        let mut last = 0;
        for &member in members {
            let against = |other: usize| compare(sightings[other].place, sightings[member].place);
            let mut low = 0;
            let mut high = distinct.len();
            let mut probe = last;
            let mut found = None;
            while low < high {
                match against(distinct[probe])? {
                    Ordering::Equal => {
                        found = Some(probe);
                        break;
                    }
                    Ordering::Less => low = probe + 1,
                    Ordering::Greater => high = probe,
                }
                probe = low + (high - low) / 2;
            }
            match found {
                Some(at) => {
                    last = at;
                    same[member] = distinct[at];
                }
                None => {
                    distinct.insert(low, member);
                    last = low;
                }
            }
        }
    }
    let mut number = BTreeMap::new();
    Ok((0..sightings.len())
        .map(|index| {
            let next = number.len();
            *number.entry(same[index]).or_insert(next)
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use proptest::prelude::*;

    use super::*;

    fn sighting(fd: i32, ino: u64, expected: Option<u64>) -> Sighting {
        Sighting {
            place: Place { pid: 1, fd },
            close_on_exec: false,
            common: Common {
                flags: 0,
                offset: 0,
                dev: 1,
                ino,
                mode: 0,
                rdev: 0,
            },
            owner: None,
            glance: Glance::default(),
            expected: expected.and_then(ObjectId::from_raw),
        }
    }

    #[test]
    fn what_is_as_expected_costs_one_comparison_each() {
        let sightings: Vec<_> = (0..100)
            .map(|fd| sighting(fd, 5, Some(fd as u64 / 2 + 1)))
            .collect();
        let compared = Cell::new(0);
        let groups = group(&sightings, |one, other| {
            compared.set(compared.get() + 1);
            Ok((one.fd / 2).cmp(&(other.fd / 2)))
        });
        assert_eq!(
            groups.unwrap(),
            (0..100).map(|fd| fd / 2).collect::<Vec<usize>>()
        );
        assert!(compared.get() <= 100, "{}", compared.get());
    }

    proptest! {
        /// Whatever was expected, those that are one are found to be one, and no others.
        #[test]
        fn groups_are_the_descriptions(
            all in proptest::collection::vec((0u64..3, 0u32..4, proptest::option::of(1u64..5)), 0..40),
        ) {
            let sightings: Vec<_> = all
                .iter()
                .enumerate()
                .map(|(fd, (ino, _, expected))| sighting(fd as i32, *ino, *expected))
                .collect();
            let which = |fd: i32| all[fd as usize].1.wrapping_mul(2_654_435_761);
            let groups =
                group(&sightings, |one, other| Ok(which(one.fd).cmp(&which(other.fd)))).unwrap();
            for (i, a) in all.iter().enumerate() {
                for (j, b) in all.iter().enumerate() {
                    prop_assert_eq!(groups[i] == groups[j], (a.0, a.1) == (b.0, b.1));
                }
            }
            let mut seen = 0;
            for group in groups {
                prop_assert!(group <= seen);
                seen = seen.max(group + 1);
            }
        }
    }
}
