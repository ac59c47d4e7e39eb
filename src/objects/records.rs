//! Records of tables and descriptions: to a context and back.
//!
//! Tables, pipes and files, of which there are many, have fixed layouts; the rest, shaped by its kind, is JSON.

use std::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Error;
use super::file::{self, Form};
use super::model::{Common, Description, ObjectId, Owner, Recorded, Slot, Table};
use super::pipe::{Content, Pipe};
use super::state::State;
use super::sysv::Sysv;
use crate::record::{self, Context, Kind, ObjectKey, Record};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct TableRecord {
    holders: u32,
    slots: u32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct SlotRecord {
    fd: i32,
    close_on_exec: u32,
    description: u64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct FileRecord {
    flags: i32,
    mode: u32,
    offset: i64,
    dev: u64,
    ino: u64,
    rdev: u64,
    owner_kind: i32,
    /// 0: nobody.
    owner_id: i32,
    owner_signal: i32,
    form: u32,
    /// Host PID of a [`Form::Process`].
    process: i32,
    pinned: u32,
    seals: i32,
    path_len: u32,
}
const _: () = assert!(size_of::<FileRecord>() == 72 && offset_of!(FileRecord, owner_kind) == 40);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct PipeRecord {
    dev: u64,
    ino: u64,
    capacity: u64,
    internal: u32,
    packets: u32,
    len: u64,
}

fn form_number(form: Form) -> (u32, i32) {
    match form {
        Form::Plain => (1, 0),
        Form::Memfd => (2, 0),
        Form::Device => (3, 0),
        Form::Terminal => (4, 0),
        Form::Process(pid) => (5, pid),
        Form::Kept => (6, 0),
        Form::Master => (7, 0),
    }
}

fn form(number: u32, pid: i32) -> Option<Form> {
    Some(match number {
        1 => Form::Plain,
        2 => Form::Memfd,
        3 => Form::Device,
        4 => Form::Terminal,
        5 => Form::Process(pid),
        6 => Form::Kept,
        7 => Form::Master,
        _ => return None,
    })
}

fn kind(state: &State) -> Kind {
    match state {
        State::File(file) if file.form == Form::Memfd => Kind::Memfd,
        State::File(_) => Kind::OpenFile,
        State::Pipe(_) => Kind::OtherFile,
        State::Eventfd(_) => Kind::Eventfd,
        State::Epoll(_) => Kind::Epoll,
        State::Timerfd(_) => Kind::Timerfd,
        State::Signalfd(_) => Kind::Signalfd,
        State::Inotify(_) => Kind::Inotify,
        State::Socket(socket) => socket.record_kind(),
    }
}

const KINDS: [Kind; 11] = [
    Kind::Memfd,
    Kind::OpenFile,
    Kind::OtherFile,
    Kind::Eventfd,
    Kind::Epoll,
    Kind::Timerfd,
    Kind::Signalfd,
    Kind::Inotify,
    Kind::UnixSocket,
    Kind::TcpSocket,
    Kind::UdpSocket,
];

/// Writes all records: pipes, the descriptions in the order of their ids, locks, tables.
pub fn write(context: &mut Context, recorded: &Recorded) -> Result<(), Error> {
    for pipe in recorded.pipes.values() {
        write_pipe(context, pipe)?;
    }
    for (id, description) in &recorded.descriptions {
        match &description.state {
            State::File(state) => write_file(context, *id, description, state)?,
            state => drop(context.put_json(kind(state), *id, description)?),
        }
    }
    if recorded.sysv != Sysv::default() {
        let id = context.new_object();
        context.put_json(Kind::SystemVIpc, id, &recorded.sysv)?;
    }
    for namespace in &recorded.mounts {
        let id = context.new_object();
        context.put_json(Kind::Mounts, id, namespace)?;
    }
    for terminal in &recorded.terminals {
        let id = context.new_object();
        context.put_json(Kind::Terminal, id, terminal)?;
    }
    if !recorded.locks.is_empty() {
        let id = context.new_object();
        context.put_json(Kind::FileLocks, id, &recorded.locks)?;
    }
    for table in &recorded.tables {
        let id = context.new_object();
        let mut tail = Vec::new();
        for holder in &table.holders {
            tail.extend_from_slice(i64::from(*holder).as_bytes());
        }
        for slot in &table.slots {
            let slot = SlotRecord {
                fd: slot.fd,
                close_on_exec: slot.close_on_exec.into(),
                description: context.refer(slot.description)?,
            };
            tail.extend_from_slice(slot.as_bytes());
        }
        let head = TableRecord {
            holders: table.holders.len() as u32,
            slots: table.slots.len() as u32,
        };
        context.put(Kind::FileTable, id, &head, &tail)?;
    }
    Ok(())
}

fn write_pipe(context: &mut Context, pipe: &Pipe) -> Result<(), Error> {
    let id = context
        .intern(ObjectKey::new(Kind::Pipe, pipe.inode.0, pipe.inode.1))
        .id();
    let empty = Content::default();
    let content = pipe.content.as_ref().unwrap_or(&empty);
    let head = PipeRecord {
        dev: pipe.inode.0,
        ino: pipe.inode.1,
        capacity: pipe.capacity as u64,
        internal: pipe.content.is_some().into(),
        packets: content.packets.len() as u32,
        len: content.bytes.len() as u64,
    };
    let mut tail: Vec<u8> = content
        .packets
        .iter()
        .flat_map(|len| (*len as u64).to_ne_bytes())
        .collect();
    tail.extend_from_slice(&content.bytes);
    context.put(Kind::Pipe, id, &head, &tail)?;
    Ok(())
}

fn write_file(
    context: &mut Context,
    id: ObjectId,
    description: &Description,
    state: &file::State,
) -> Result<(), Error> {
    let common = description.common;
    let owner = description.owner.unwrap_or(Owner::NOBODY);
    let (form, process) = form_number(state.form);
    let head = FileRecord {
        flags: common.flags,
        mode: common.mode,
        offset: common.offset,
        dev: common.dev,
        ino: common.ino,
        rdev: common.rdev,
        owner_kind: owner.kind,
        owner_id: owner.id,
        owner_signal: owner.signal,
        form,
        process,
        pinned: state.pinned.into(),
        seals: state.seals,
        path_len: state.path.len() as u32,
    };
    context.put(kind(&description.state), id, &head, state.path.as_bytes())?;
    Ok(())
}

fn bad(record: &Record<'_>, problem: &str) -> Error {
    let (kind, id) = (record.kind(), record.id());
    record::Error::Payload {
        kind,
        id,
        problem: problem.into(),
    }
    .into()
}

/// Reads back what [`write()`] wrote; the names of the processes are others' records.
pub fn read(context: &Context) -> Result<Recorded, Error> {
    let (recorded, errors) = read_as_far(context);
    errors.into_iter().next().map_or(Ok(recorded), Err)
}

/// As [`read`], as far as the records are good; and what is wrong with the others.
pub fn read_as_far(context: &Context) -> (Recorded, Vec<Error>) {
    let mut recorded = Recorded::default();
    let mut errors = Vec::new();
    for record in context.records() {
        let kind = record.kind();
        let done = match kind {
            Kind::Pipe => {
                read_pipe(&record).map(|pipe| drop(recorded.pipes.insert(pipe.inode, pipe)))
            }
            Kind::OpenFile | Kind::Memfd => read_file(&record).map(|file| {
                recorded.descriptions.insert(record.id(), file);
            }),
            _ if KINDS.contains(&kind) => json(&record).map(|description| {
                recorded.descriptions.insert(record.id(), description);
            }),
            Kind::SystemVIpc => json(&record).map(|sysv| recorded.sysv = sysv),
            Kind::Mounts => json(&record).map(|mounts| recorded.mounts.push(mounts)),
            Kind::Terminal => json(&record).map(|terminal| recorded.terminals.push(terminal)),
            Kind::FileLocks => json(&record).map(|locks| recorded.locks = locks),
            Kind::FileTable => read_table(&record).map(|table| recorded.tables.push(table)),
            _ => Ok(()),
        };
        errors.extend(done.err());
    }
    (recorded, errors)
}

fn json<T: serde::de::DeserializeOwned>(record: &Record<'_>) -> Result<T, Error> {
    Ok(record.json()?)
}

fn read_table(record: &Record<'_>) -> Result<Table<ObjectId>, Error> {
    let (head, tail) = record.fixed::<TableRecord>()?;
    let short = |_| bad(record, "shorter than its lists");
    let (holders, tail) =
        <[i64]>::ref_from_prefix_with_elems(tail, head.holders as usize).map_err(|_| short(()))?;
    let slots = <[SlotRecord]>::ref_from_bytes_with_elems(tail, head.slots as usize)
        .map_err(|_| short(()))?;
    if holders.is_empty() {
        return Err(bad(record, "a table without holders"));
    }
    let slot = |slot: &SlotRecord| {
        Ok(Slot {
            fd: slot.fd,
            close_on_exec: slot.close_on_exec != 0,
            description: ObjectId::from_raw(slot.description)
                .ok_or_else(|| bad(record, "a slot without description"))?,
        })
    };
    Ok(Table {
        holders: holders.iter().map(|pid| *pid as i32).collect(),
        slots: slots.iter().map(slot).collect::<Result<_, Error>>()?,
    })
}

fn read_pipe(record: &Record<'_>) -> Result<Pipe, Error> {
    let (head, tail) = record.fixed::<PipeRecord>()?;
    let (packets, bytes) = <[u64]>::ref_from_prefix_with_elems(tail, head.packets as usize)
        .map_err(|_| bad(record, "shorter than its list of packets"))?;
    if bytes.len() as u64 != head.len {
        return Err(bad(record, "content of another length than it says"));
    }
    let content = Content {
        bytes: bytes.to_vec(),
        packets: packets.iter().map(|len| *len as usize).collect(),
    };
    Ok(Pipe {
        inode: (head.dev, head.ino),
        capacity: head.capacity as usize,
        content: (head.internal != 0).then_some(content),
    })
}

fn read_file(record: &Record<'_>) -> Result<Description, Error> {
    let (head, tail) = record.fixed::<FileRecord>()?;
    let path = tail
        .get(..head.path_len as usize)
        .and_then(|path| std::str::from_utf8(path).ok());
    let owner = Owner {
        kind: head.owner_kind,
        id: head.owner_id,
        signal: head.owner_signal,
    };
    Ok(Description {
        common: Common {
            flags: head.flags,
            offset: head.offset,
            dev: head.dev,
            ino: head.ino,
            mode: head.mode,
            rdev: head.rdev,
        },
        owner: (owner.id != 0 || owner.signal != 0).then_some(owner),
        state: State::File(file::State {
            form: form(head.form, head.process).ok_or_else(|| bad(record, "an unknown form"))?,
            path: path
                .ok_or_else(|| bad(record, "a path that is not text"))?
                .to_owned(),
            pinned: head.pinned != 0,
            seals: head.seals,
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::epoll;
    use crate::objects::locks::{self, Lock};
    use crate::objects::pipe;

    #[test]
    fn what_is_written_is_read() {
        let mut context = Context::buffering().unwrap();
        let mut recorded = Recorded::default();
        let common = Common {
            flags: 2,
            offset: 77,
            dev: 5,
            ino: 6,
            mode: 0o100_644,
            rdev: 0,
        };
        let file = State::File(file::State {
            form: Form::Process(12),
            path: "/tmp/ä b".into(),
            pinned: true,
            seals: 3,
        });
        let owner = Some(Owner {
            kind: 1,
            id: 44,
            signal: 10,
        });
        let states = [
            (file, owner),
            (
                State::Pipe(pipe::State {
                    fifo: Some("/x".into()),
                }),
                None,
            ),
            (State::Epoll(epoll::State::default()), None),
        ];
        let mut slots = Vec::new();
        for (fd, (state, owner)) in states.into_iter().enumerate() {
            let id = context.new_object();
            recorded.descriptions.insert(
                id,
                Description {
                    common,
                    owner,
                    state,
                },
            );
            slots.push(Slot {
                fd: fd as i32,
                close_on_exec: fd == 1,
                description: id,
            });
        }
        let id = slots[0].description;
        recorded.locks.push(Lock {
            owner: locks::Owner::Flock(id),
            inode: (5, 6),
            write: true,
            start: 0,
            end: u64::MAX,
        });
        recorded.tables.push(Table {
            holders: vec![7, 8],
            slots,
        });
        let content = Content {
            bytes: b"one+three".to_vec(),
            packets: vec![4, 5],
        };
        for (ino, content) in [(1, None), (2, Some(content))] {
            recorded.pipes.insert(
                (9, ino),
                Pipe {
                    inode: (9, ino),
                    capacity: 4096,
                    content,
                },
            );
        }
        write(&mut context, &recorded).unwrap();
        context.finish().unwrap();
        assert_eq!(read(&context).unwrap(), recorded);
    }
}
