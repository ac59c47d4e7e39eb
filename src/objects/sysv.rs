//! System V semaphores and message queues. They belong to the IPC namespace, not to a process.
//!
//! In a namespace of the tree's own all are the tree's: those made since are removed. In ours those are that a process of
//! the tree used last at the checkpoint; others are nobody's business. All is asked and done by a process of the tree, so
//! that numbers mean what they mean there. What a process owes a semaphore at its end (`SEM_UNDO`) can't be read: putting a
//! value back forgives it, which is right unless it was owed at the checkpoint and was paid since.

use std::collections::BTreeMap;

use nix::errno::Errno;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::Error;
use super::live::Holder;
use super::model::Recorded;
use super::reborn::Gone;
use crate::freeze::{Arg, Batch, Output, Outputs, StepId, Stopped};
use crate::kernel::sysv_ipc;
use crate::outcome::Refusal;

/// All that a checkpoint holds of System V IPC.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Sysv {
    /// The IPC namespace is the tree's own.
    pub own_namespace: bool,
    /// Values of the semaphores of each set.
    pub semaphores: BTreeMap<i32, Vec<u16>>,
    /// Messages of each queue.
    pub queues: BTreeMap<i32, Vec<Message>>,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Its type.
    pub kind: i64,
    /// Its text.
    pub text: Vec<u8>,
}

/// What must be done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Sets and queues to remove.
    remove: (Vec<i32>, Vec<i32>),
    /// Sets whose values, and queues whose messages are wrong; of queues the number that is there.
    semaphores: Vec<i32>,
    queues: Vec<(i32, usize)>,
}

const SEM_STAT_ANY: i32 = 20;
const MSG_STAT_ANY: i32 = 13;
const SEM_INFO: i32 = 19;
const MSG_INFO: i32 = 12;
/// `msgrcv(2)`, with `CONFIG_CHECKPOINT_RESTORE`.
const MSG_COPY: i32 = 0o40000;
/// Room for any of the structures.
const ROOM: usize = 128;
/// Sets, queues or messages looked at in one batch.
const AT_ONCE: usize = 50;

/// How many sets and queues there are: asked together with other things.
#[derive(Debug)]
pub struct Counts {
    semaphores: Output,
    queues: Output,
}

impl Counts {
    /// Adds the questions.
    pub fn add(batch: &mut Batch) -> Self {
        let (semaphores, queues) = (batch.output(ROOM), batch.output(ROOM));
        let arguments = [0.into(), 0.into(), SEM_INFO.into(), semaphores.arg()];
        batch.call(libc::SYS_semctl, &arguments);
        batch.call(libc::SYS_msgctl, &[0.into(), MSG_INFO.into(), queues.arg()]);
        Self { semaphores, queues }
    }

    fn are(&self, outputs: &Outputs, recorded: &Sysv) -> bool {
        // `semusz` of struct seminfo, `msgpool` of struct msginfo: the numbers that are in use.
        let semaphores = int(&outputs.bytes(&self.semaphores)[28..]) as usize;
        let queues = int(outputs.bytes(&self.queues)) as usize;
        (semaphores, queues) == (recorded.semaphores.len(), recorded.queues.len())
    }
}

fn int(bytes: &[u8]) -> i32 {
    bytes
        .first_chunk()
        .map_or(0, |bytes| i32::from_ne_bytes(*bytes))
}

fn long(bytes: &[u8]) -> i64 {
    bytes
        .first_chunk()
        .map_or(0, |bytes| i64::from_ne_bytes(*bytes))
}

fn text(path: &str) -> impl Fn(std::io::Error) -> Error {
    let path = path.to_owned();
    move |error| Error::Text {
        path: path.clone(),
        problem: error.to_string(),
    }
}

fn namespace(pid: &str) -> Result<String, Error> {
    let path = format!("/proc/{pid}/ns/ipc");
    let link = std::fs::read_link(&path).map_err(text(&path))?;
    Ok(link.to_string_lossy().into_owned())
}

/// Messages in a queue, and their bytes.
type Size = (usize, usize);

/// A process through which all is done.
struct Through<'a, 't> {
    stopped: &'a mut Stopped<'t>,
    pid: Pid,
}

/// What there is: the values of each set, and of each queue the number of messages and bytes.
struct Found {
    semaphores: Vec<(i32, usize)>,
    queues: Vec<(i32, Size)>,
}

impl Through<'_, '_> {
    fn run(&mut self, batch: &Batch) -> Result<Outputs, Error> {
        Ok(self.stopped.run(self.pid, batch)?)
    }

    /// Lists all of the namespace.
    fn list(&mut self) -> Result<Found, Error> {
        let mut batch = Batch::new();
        let room = batch.output(ROOM);
        let arguments = [0.into(), 0.into(), SEM_INFO.into(), room.arg()];
        let sets = batch.call(libc::SYS_semctl, &arguments);
        let queues = batch.call(libc::SYS_msgctl, &[0.into(), MSG_INFO.into(), room.arg()]);
        let outputs = self.run(&batch)?;
        // Both return the highest index in use; 0 also if there is none.
        let highest = |step| outputs.result(step).unwrap_or(0) as i32;
        let (sets, queues) = (highest(sets), highest(queues));
        Ok(Found {
            semaphores: self.stat_sets((0..=sets).collect(), SEM_STAT_ANY)?,
            queues: self.stat_queues((0..=queues).collect(), MSG_STAT_ANY)?,
        })
    }

    /// Sets that are there, and how many semaphores they have.
    fn stat_sets(&mut self, which: Vec<i32>, how: i32) -> Result<Vec<(i32, usize)>, Error> {
        let found = self.stat(which, how, |batch, id, room| {
            batch.call(libc::SYS_semctl, &[id.into(), 0.into(), how.into(), room])
        })?;
        let count = std::mem::offset_of!(libc::semid_ds, sem_nsems);
        let set = |(id, bytes): (i32, Vec<u8>)| (id, long(&bytes[count..]) as usize);
        Ok(found.into_iter().map(set).collect())
    }

    /// Queues that are there, and how many messages and bytes they have.
    fn stat_queues(&mut self, which: Vec<i32>, how: i32) -> Result<Vec<(i32, Size)>, Error> {
        let found = self.stat(which, how, |batch, id, room| {
            batch.call(libc::SYS_msgctl, &[id.into(), how.into(), room])
        })?;
        let queue = |(id, bytes): (i32, Vec<u8>)| {
            let field = |at: usize| long(&bytes[at..]) as usize;
            let messages = field(std::mem::offset_of!(libc::msqid_ds, msg_qnum));
            let in_bytes = field(std::mem::offset_of!(libc::msqid_ds, __msg_cbytes));
            (id, (messages, in_bytes))
        };
        Ok(found.into_iter().map(queue).collect())
    }

    /// What `ask` finds of those that are there. It is given an id and room for the answer.
    fn stat(
        &mut self,
        which: Vec<i32>,
        how: i32,
        ask: impl Fn(&mut Batch, i32, Arg) -> StepId,
    ) -> Result<Vec<(i32, Vec<u8>)>, Error> {
        let mut found = Vec::new();
        for some in which.chunks(AT_ONCE) {
            let mut batch = Batch::new();
            let mut asked = Vec::with_capacity(some.len());
            for id in some {
                let room = batch.output(ROOM);
                asked.push((*id, ask(&mut batch, *id, room.arg()), room));
            }
            let outputs = self.run(&batch)?;
            for (id, step, room) in asked {
                if let Ok(result) = outputs.result(step) {
                    // By an index the answer is the id.
                    let id = if how == libc::IPC_STAT {
                        id
                    } else {
                        result as i32
                    };
                    found.push((id, outputs.bytes(&room).to_vec()));
                }
            }
        }
        Ok(found)
    }

    fn values(&mut self, id: i32, count: usize) -> Result<Vec<u16>, Error> {
        let mut batch = Batch::new();
        let room = batch.output(count * 2);
        let arguments = [id.into(), 0.into(), libc::GETALL.into(), room.arg()];
        let step = batch.call(libc::SYS_semctl, &arguments);
        let outputs = self.run(&batch)?;
        outputs.result(step).map_err(self.failed(id, "semctl"))?;
        let pairs = outputs.bytes(&room).chunks_exact(2);
        Ok(pairs
            .map(|pair| u16::from_ne_bytes([pair[0], pair[1]]))
            .collect())
    }

    /// The messages of a queue, which stay there.
    fn messages(&mut self, id: i32, count: usize, bytes: usize) -> Result<Vec<Message>, Error> {
        let mut found = Vec::with_capacity(count);
        let flags = MSG_COPY | libc::IPC_NOWAIT;
        for first in (0..count).step_by(AT_ONCE) {
            let mut batch = Batch::new();
            let mut asked: Vec<(StepId, Output)> = Vec::new();
            for index in first..count.min(first + AT_ONCE) {
                if !batch.has_room(1, bytes + 16) {
                    break;
                }
                let room = batch.output(8 + bytes);
                let arguments = [
                    id.into(),
                    room.arg(),
                    bytes.into(),
                    index.into(),
                    flags.into(),
                ];
                asked.push((batch.call(libc::SYS_msgrcv, &arguments), room));
            }
            let outputs = self.run(&batch)?;
            for (step, room) in asked {
                let length = outputs.result(step).map_err(self.failed(id, "msgrcv"))? as usize;
                let message = outputs.bytes(&room);
                found.push(Message {
                    kind: long(message),
                    text: message[8..8 + length].to_vec(),
                });
            }
        }
        Ok(found)
    }

    fn failed(&self, id: i32, call: &'static str) -> impl Fn(Errno) -> Error {
        let pid = self.pid.as_raw();
        move |errno| Error::Descriptor {
            what: format!("System V object {id}"),
            pid,
            call,
            errno,
        }
    }

    /// All of what was found.
    fn read(&mut self, found: Found, own_namespace: bool) -> Result<Sysv, Error> {
        let mut all = Sysv {
            own_namespace,
            ..Sysv::default()
        };
        for (id, count) in found.semaphores {
            all.semaphores.insert(id, self.values(id, count)?);
        }
        for (id, (count, bytes)) in found.queues {
            all.queues.insert(id, self.messages(id, count, bytes)?);
        }
        Ok(all)
    }
}

/// Records what belongs to the tree.
pub(super) fn capture(
    stopped: &mut Stopped<'_>,
    holders: &BTreeMap<i32, Holder>,
) -> Result<Sysv, Error> {
    let Some(pid) = holders.keys().next().copied() else {
        return Ok(Sysv::default());
    };
    let own_namespace = namespace(&pid.to_string())? != namespace("self")?;
    let pid = Pid::from_raw(pid);
    let mut through = Through { stopped, pid };
    let found = if own_namespace {
        through.list()?
    } else {
        // What was put back before was used last by us.
        let ourselves = std::process::id() as i32;
        let is_used = |users: &[i32]| {
            let mut users = users.iter();
            users.any(|user| holders.contains_key(user) || *user == ourselves)
        };
        let used = |all: Vec<(i32, Vec<i32>)>| -> Vec<i32> {
            let used = all.into_iter().filter(|(_, users)| is_used(users));
            used.map(|(id, _)| id).collect()
        };
        let sets = used(sysv_ipc::semaphores().map_err(text("/proc/sysvipc/sem"))?);
        let queues = used(sysv_ipc::queues().map_err(text("/proc/sysvipc/msg"))?);
        Found {
            semaphores: through.stat_sets(sets, libc::IPC_STAT)?,
            queues: through.stat_queues(queues, libc::IPC_STAT)?,
        }
    };
    through.read(found, own_namespace)
}

/// Compares with what is there, and plans, or refuses what can't be undone. `counts` were asked if the namespace is the
/// tree's own.
pub(super) fn plan(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded,
    counts: Option<(&Counts, &Outputs)>,
    lost: &Gone,
) -> Result<Plan, Error> {
    let then = &recorded.sysv;
    let same_number = counts.is_none_or(|(counts, outputs)| counts.are(outputs, then));
    let nothing = then.semaphores.is_empty() && then.queues.is_empty();
    let Some(pid) = recorded.tables.first().map(|table| table.pid()) else {
        return Ok(Plan::default());
    };
    if lost.contains_key(&pid) && (then.own_namespace || !nothing) {
        return Err(Refusal {
            object: "System V semaphores and message queues".into(),
            holder: recorded.holder(pid),
            remedy: "the process has ended since the checkpoint or is to be made again, and nobody else can be asked for them; take a new checkpoint".into(),
        }
        .into());
    }
    if nothing && same_number {
        return Ok(Plan::default());
    }
    let refuse = |object: String, remedy: &str| Refusal {
        object,
        holder: recorded.holder(pid),
        remedy: remedy.into(),
    };
    let mut through = Through {
        stopped,
        pid: Pid::from_raw(pid),
    };
    let found = if then.own_namespace {
        through.list()?
    } else {
        Found {
            semaphores: through
                .stat_sets(then.semaphores.keys().copied().collect(), libc::IPC_STAT)?,
            queues: through.stat_queues(then.queues.keys().copied().collect(), libc::IPC_STAT)?,
        }
    };
    let now = through.read(found, then.own_namespace)?;
    let gone = "it was removed since the checkpoint and can't be made again";
    let mut plan = Plan::default();
    for (id, values) in &then.semaphores {
        match now.semaphores.get(id) {
            None => return Err(refuse(format!("System V semaphores {id}"), gone).into()),
            Some(now) if now != values => plan.semaphores.push(*id),
            Some(_) => {}
        }
    }
    for (id, messages) in &then.queues {
        match now.queues.get(id) {
            None => return Err(refuse(format!("System V message queue {id}"), gone).into()),
            Some(now) if now != messages => plan.queues.push((*id, now.len())),
            Some(_) => {}
        }
    }
    let is_new = |known: bool| then.own_namespace && !known;
    let sets = now.semaphores.keys().copied();
    plan.remove.0 = sets
        .filter(|id| is_new(then.semaphores.contains_key(id)))
        .collect();
    let queues = now.queues.keys().copied();
    plan.remove.1 = queues
        .filter(|id| is_new(then.queues.contains_key(id)))
        .collect();
    Ok(plan)
}

/// Carries out a plan.
pub(super) fn execute(
    stopped: &mut Stopped<'_>,
    recorded: &Recorded,
    plan: &Plan,
) -> Result<(), Error> {
    let Some(pid) = recorded.tables.first().map(|table| table.pid()) else {
        return Ok(());
    };
    let mut through = Through {
        stopped,
        pid: Pid::from_raw(pid),
    };
    let then = &recorded.sysv;
    let mut batches = vec![Batch::new()];
    for id in &plan.remove.0 {
        let arguments = [(*id).into(), 0.into(), libc::IPC_RMID.into()];
        add(&mut batches, 0, libc::SYS_semctl, |_| arguments.to_vec());
    }
    for id in &plan.remove.1 {
        let arguments = [(*id).into(), libc::IPC_RMID.into()];
        add(&mut batches, 0, libc::SYS_msgctl, |_| arguments.to_vec());
    }
    for id in &plan.semaphores {
        let bytes: Vec<u8> = then.semaphores[id]
            .iter()
            .flat_map(|value| value.to_ne_bytes())
            .collect();
        add(&mut batches, bytes.len(), libc::SYS_semctl, |batch| {
            let values = batch.input(&bytes);
            vec![(*id).into(), 0.into(), libc::SETALL.into(), values]
        });
    }
    for (id, count) in &plan.queues {
        for _ in 0..*count {
            // No room for the text: the rest of it is dropped (MSG_NOERROR).
            add(&mut batches, 8, libc::SYS_msgrcv, |batch| {
                let flags = libc::IPC_NOWAIT | libc::MSG_NOERROR;
                let room = batch.output(8).arg();
                vec![(*id).into(), room, 0.into(), 0.into(), flags.into()]
            });
        }
        for message in &then.queues[id] {
            let mut bytes = message.kind.to_ne_bytes().to_vec();
            bytes.extend_from_slice(&message.text);
            add(&mut batches, bytes.len(), libc::SYS_msgsnd, |batch| {
                let buffer = batch.input(&bytes);
                let length = message.text.len();
                vec![(*id).into(), buffer, length.into(), libc::IPC_NOWAIT.into()]
            });
        }
    }
    for batch in batches {
        let outputs = through.run(&batch)?;
        if let Some((_, errno)) = outputs.first_failure() {
            return Err(through.failed(0, "putting System V objects back")(errno));
        }
    }
    Ok(())
}

/// Adds a call that must succeed to the last batch, or to a new one if that is full.
fn add(
    batches: &mut Vec<Batch>,
    data: usize,
    number: libc::c_long,
    arguments: impl FnOnce(&mut Batch) -> Vec<crate::freeze::Arg>,
) {
    if !batches.last().is_some_and(|batch| batch.has_room(1, data)) {
        batches.push(Batch::new());
    }
    if let Some(batch) = batches.last_mut() {
        let arguments = arguments(batch);
        let step = batch.call(number, &arguments);
        batch.must_succeed(step);
    }
}
