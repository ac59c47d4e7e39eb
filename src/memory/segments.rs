//! System V shared memory segments as objects of an IPC namespace (sysvipc(7)). Their content goes with the mappings; this is
//! about which there are, and whose they are.
//!
//! In an IPC namespace of the tree's own all segments are the tree's. In ours those are that the tree has attached; others
//! are not looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::freeze::{self, Batch, Output, Outputs, StepId, Stopped};
use crate::kernel::{namespaces, sysv_segment};
use crate::outcome::Difference;

use super::Result;
use super::image::SpaceImage;
use super::space::{refuse, system};

/// The segments of a tree at a checkpoint.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Segments(Vec<Namespace>);

/// Those of one IPC namespace.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Namespace {
    /// The process that is asked.
    #[serde(with = "number")]
    pid: Pid,
    /// Whether all segments there are the tree's.
    is_own: bool,
    there: Vec<Segment>,
}

/// One segment, as shmctl(2) tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Segment {
    id: i32,
    key: i32,
    user: u32,
    group: u32,
    mode: u32,
    size: u64,
}

impl Segments {
    /// Those that are the tree's alone, in its one IPC namespace; `None` if there are others.
    pub fn own(&self) -> Option<Vec<sysv_segment::Segment>> {
        let there = match &self.0[..] {
            [] => &[],
            [namespace] if namespace.is_own || namespace.there.is_empty() => &namespace.there[..],
            _ => return None,
        };
        let own = there.iter().map(|segment| sysv_segment::Segment {
            id: segment.id,
            key: segment.key,
            user: segment.user,
            group: segment.group,
            mode: segment.mode,
            size: segment.size,
        });
        Some(own.collect())
    }
}

/// A PID as its number.
mod number {
    use nix::unistd::Pid;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(pid: &Pid, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_i32(pid.as_raw())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Pid, D::Error> {
        i32::deserialize(from).map(Pid::from_raw)
    }
}

/// `struct shm_info` (`linux/shm.h`).
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Info {
    used: i32,
    pad: i32,
    pages: [u64; 3],
    unused: [u64; 2],
}

/// `struct shmid64_ds` as far as it matters here.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Status {
    key: i32,
    user: u32,
    group: u32,
    creator: [u32; 2],
    mode: u32,
    sequence: [u64; 3],
    size: u64,
}

const _: () =
    assert!(std::mem::offset_of!(Status, size) == std::mem::offset_of!(libc::shmid_ds, shm_segsz));

const SHM_STAT: i32 = 13;
const SHM_INFO: i32 = 14;
/// Most segments that are listed.
const MOST: u64 = 4096;

/// A question how many segments there are, as a step of a batch of the process that is asked.
#[derive(Debug)]
pub struct Asked(StepId, Output);

/// Segments to be removed, each by a process.
pub type Created = Vec<(Pid, i32)>;

impl Segments {
    /// Notes those of a tree whose address spaces are given. Refuses those that nobody has attached: nothing keeps their
    /// content.
    pub fn capture(stopped: &mut Stopped<'_>, images: &[SpaceImage]) -> Result<Self> {
        let us = namespaces::ipc_of_us()
            .map_err(|errno| system(Pid::this(), "look at our IPC namespace", errno))?;
        let mut attached: BTreeMap<u64, (Pid, BTreeSet<i32>)> = BTreeMap::new();
        for image in images {
            let directory = stopped.member(image.pid)?.namespaces.as_fd();
            let namespace = namespaces::ipc(directory)
                .map_err(|errno| system(image.pid, "look at its IPC namespace", errno))?;
            let (_, ids) = attached
                .entry(namespace)
                .or_insert((image.pid, BTreeSet::new()));
            let segments = image.layout.vmas.iter().filter(|vma| vma.is_segment());
            ids.extend(segments.map(|vma| vma.inode as i32));
        }
        let mut all = Vec::new();
        for (inode, (pid, ids)) in attached {
            let is_own = inode != us;
            let there = match is_own {
                true => list(stopped, pid)?,
                false => look_up(stopped, pid, &ids)?,
            };
            if let Some(lonely) = there.iter().find(|segment| !ids.contains(&segment.id)) {
                return Err(refuse(
                    pid,
                    format!("System V shared memory segment {}", lonely.id),
                    "no process has it attached, so its content can't be kept; attach it, or remove it (ipcrm -m)",
                ));
            }
            if is_own || !there.is_empty() {
                all.push(Namespace { pid, is_own, there });
            }
        }
        Ok(Self(all))
    }

    /// Adds the question to a batch of `pid`, if that is to be asked.
    pub fn ask(&self, pid: Pid, batch: &mut Batch) -> Option<Asked> {
        self.0.iter().find(|namespace| namespace.pid == pid)?;
        let out = batch.output(size_of::<Info>());
        let arguments = [0.into(), SHM_INFO.into(), out.arg()];
        Some(Asked(batch.call(libc::SYS_shmctl, &arguments), out))
    }

    /// Refuses if the process that is to be asked will not be there.
    pub fn check_asked(&self, is_lost: impl Fn(Pid) -> bool) -> Result<()> {
        match self.0.iter().find(|namespace| is_lost(namespace.pid)) {
            None => Ok(()),
            Some(namespace) => Err(refuse(
                namespace.pid,
                "System V shared memory",
                "the process has ended since the checkpoint or is to be made again, and nobody else can be asked for it; take a new checkpoint",
            )),
        }
    }

    /// Refuses if any has been removed or changed hands since. Returns those to be removed. `answers` are what the processes
    /// that [`Segments::ask`] gave a question have answered.
    pub fn check(
        &self,
        stopped: &mut Stopped<'_>,
        answers: &[(Asked, &Outputs)],
    ) -> Result<Created> {
        let mut created = Vec::new();
        let nobody_has_any = |(asked, done): &(Asked, &Outputs)| {
            done.result(asked.0).is_ok() && read::<Info>(done.bytes(&asked.1)).used == 0
        };
        if self.0.iter().all(|namespace| namespace.there.is_empty())
            && answers.iter().all(nobody_has_any)
        {
            return Ok(created);
        }
        for namespace in &self.0 {
            let live = namespace.live(stopped)?;
            for was in &namespace.there {
                if live.iter().any(|is| is == was) {
                    continue;
                }
                return Err(refuse(
                    namespace.pid,
                    format!("System V shared memory segment {}", was.id),
                    "it was removed since the checkpoint, or its owner or mode was changed; take a new checkpoint",
                ));
            }
            let new = live
                .iter()
                .filter(|is| !namespace.there.iter().any(|was| was.id == is.id));
            created.extend(new.map(|segment| (namespace.pid, segment.id)));
        }
        Ok(created)
    }

    /// Removes those that were made since, once nobody has them attached any more.
    pub fn remove(stopped: &mut Stopped<'_>, created: &Created) -> Result<()> {
        for (pid, id) in created {
            let mut batch = Batch::new();
            let arguments = [(*id).into(), libc::IPC_RMID.into(), 0.into()];
            let removed = batch.call(libc::SYS_shmctl, &arguments);
            let done = stopped.run(*pid, &batch)?;
            // It goes by itself if it was marked to be removed.
            match done.result(removed) {
                Ok(_) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::EIDRM) => {}
                Err(errno) => {
                    let what = "shmctl IPC_RMID";
                    return Err(freeze::Error::Call {
                        pid: *pid,
                        what,
                        errno,
                    }
                    .into());
                }
            }
        }
        Ok(())
    }

    /// Compares those that there are with those that there were.
    pub fn verify(&self, stopped: &mut Stopped<'_>) -> Result<Vec<Difference>> {
        let mut differences = Vec::new();
        for namespace in &self.0 {
            let live = namespace.live(stopped)?;
            if live != namespace.there {
                differences.push(Difference {
                    what: format!("System V shared memory of pid {}", namespace.pid),
                    expected: format!("{:?}", namespace.there),
                    found: format!("{live:?}"),
                });
            }
        }
        Ok(differences)
    }
}

impl Namespace {
    fn live(&self, stopped: &mut Stopped<'_>) -> Result<Vec<Segment>> {
        match self.is_own {
            true => list(stopped, self.pid),
            false => {
                let ids = self.there.iter().map(|segment| segment.id).collect();
                look_up(stopped, self.pid, &ids)
            }
        }
    }
}

/// All segments of the namespace a process is in, by their ids.
fn list(stopped: &mut Stopped<'_>, pid: Pid) -> Result<Vec<Segment>> {
    let mut batch = Batch::new();
    let out = batch.output(size_of::<Info>());
    let asked = batch.call(libc::SYS_shmctl, &[0.into(), SHM_INFO.into(), out.arg()]);
    let done = stopped.run(pid, &batch)?;
    let highest = done.result(asked).map_err(|errno| freeze::Error::Call {
        pid,
        what: "shmctl SHM_INFO",
        errno,
    })?;
    if highest >= MOST {
        return Err(refuse(
            pid,
            "System V shared memory",
            format!("not more than {MOST} segments can be taken"),
        ));
    }
    if read::<Info>(done.bytes(&out)).used == 0 {
        return Ok(Vec::new());
    }
    ask(stopped, pid, SHM_STAT, 0..=highest as i32)
}

/// Those of the given ids that there are.
fn look_up(stopped: &mut Stopped<'_>, pid: Pid, ids: &BTreeSet<i32>) -> Result<Vec<Segment>> {
    match ids.is_empty() {
        true => Ok(Vec::new()),
        false => ask(stopped, pid, libc::IPC_STAT, ids.iter().copied()),
    }
}

fn ask(
    stopped: &mut Stopped<'_>,
    pid: Pid,
    command: i32,
    numbers: impl Iterator<Item = i32>,
) -> Result<Vec<Segment>> {
    let mut batch = Batch::new();
    let steps: Vec<_> = numbers
        .map(|number| {
            let out = batch.output(size_of::<libc::shmid_ds>());
            let step = batch.call(
                libc::SYS_shmctl,
                &[number.into(), command.into(), out.arg()],
            );
            (number, step, out)
        })
        .collect();
    let done = stopped.run(pid, &batch)?;
    let mut found = Vec::new();
    for (number, step, out) in steps {
        let Ok(id) = done.result(step) else { continue };
        let status: Status = read(done.bytes(&out));
        found.push(Segment {
            id: if command == SHM_STAT {
                id as i32
            } else {
                number
            },
            key: status.key,
            user: status.user,
            group: status.group,
            mode: status.mode,
            size: status.size,
        });
    }
    found.sort_by_key(|segment| segment.id);
    Ok(found)
}

fn read<T: FromBytes + FromZeros + IntoBytes + KnownLayout + Immutable>(bytes: &[u8]) -> T {
    let mut value = T::new_zeroed();
    let len = size_of::<T>();
    value.as_mut_bytes().copy_from_slice(&bytes[..len]);
    value
}
