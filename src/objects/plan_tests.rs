use proptest::prelude::*;

use super::*;
use crate::objects::eventfd;
use crate::objects::file::{self, Form};
use crate::objects::model::{Slot, Table};
use crate::objects::pipe::Pipe;

fn id(raw: u64) -> ObjectId {
    ObjectId::from_raw(raw).unwrap()
}

fn common(ino: u64) -> Common {
    Common {
        flags: libc::O_RDWR,
        offset: 0,
        dev: 5,
        ino,
        mode: libc::S_IFREG | 0o644,
        rdev: 0,
    }
}

fn file(ino: u64) -> Description {
    Description {
        common: common(ino),
        owner: None,
        state: State::File(file::State {
            form: Form::Plain,
            path: format!("/{ino}"),
            pinned: false,
            seals: 0,
        }),
    }
}

fn table<D>(slots: impl IntoIterator<Item = (i32, D)>) -> Table<D> {
    let slot = |(fd, description)| Slot {
        fd,
        close_on_exec: false,
        description,
    };
    Table {
        holders: vec![7],
        slots: slots.into_iter().map(slot).collect(),
    }
}

fn recorded(descriptions: impl IntoIterator<Item = Description>) -> Recorded {
    let descriptions: BTreeMap<ObjectId, Description> = (1..).map(id).zip(descriptions).collect();
    Recorded {
        tables: vec![table(
            descriptions.keys().map(|id| (id.raw() as i32 + 2, *id)),
        )],
        descriptions,
        names: BTreeMap::from([(7, "test".into())]),
        ..Recorded::default()
    }
}

/// A tree in which nothing has changed.
fn unchanged(recorded: &Recorded) -> Observed {
    let mut observed = Observed {
        limits: vec![1024; recorded.tables.len()],
        pipes: recorded.pipes.clone(),
        locks: recorded.locks.clone(),
        ..Observed::default()
    };
    let mut index = BTreeMap::new();
    for (id, description) in &recorded.descriptions {
        index.insert(*id, observed.descriptions.len());
        observed.descriptions.push(LiveDescription {
            place: recorded.places(*id).next().unwrap(),
            common: description.common,
            owner: description.owner,
            is: Some(*id),
            state: Some(description.state.clone()),
        });
    }
    for old in &recorded.tables {
        observed.tables.push(table(
            old.slots
                .iter()
                .map(|slot| (slot.fd, index[&slot.description])),
        ));
    }
    observed
}

/// The same after a description was closed everywhere.
fn without(recorded: &Recorded, gone: ObjectId, source: Source) -> Observed {
    let mut observed = unchanged(recorded);
    for table in &mut observed.tables {
        let descriptions = &observed.descriptions;
        table
            .slots
            .retain(|slot| descriptions[slot.description].is != Some(gone));
    }
    for live in observed
        .descriptions
        .iter_mut()
        .filter(|live| live.is == Some(gone))
    {
        (live.is, live.state) = (None, None);
    }
    observed.gone.insert(gone, source);
    observed
}

fn eventfd(count: u64, semaphore: bool) -> Description {
    Description {
        common: common(9),
        owner: None,
        state: State::Eventfd(eventfd::State { count, semaphore }),
    }
}

#[test]
fn what_is_unchanged_costs_nothing() {
    let recorded = recorded([file(1), file(2), eventfd(3, false)]);
    assert!(plan(&recorded, &unchanged(&recorded)).unwrap().is_empty());
}

#[test]
fn what_is_gone_is_made_as_it_can_be_had() {
    let recorded = recorded([file(1), file(2)]);
    let plan = plan(&recorded, &without(&recorded, id(2), Source::Pin)).unwrap();
    assert_eq!(plan.make, [(id(2), Source::Pin)]);
    assert_eq!(plan.tables[0].receive.len(), 1);
    assert_eq!(plan.tables[0].place[0].1, 4);
    assert_eq!(plan.settle[0].0, id(2), "its flags are set");
}

#[test]
fn what_can_not_be_had_is_refused_by_name() {
    let recorded = recorded([file(1), file(2)]);
    let gone = Source::Nowhere(("/2".into(), "its path is gone".into()));
    let refusal = plan(&recorded, &without(&recorded, id(2), gone)).unwrap_err();
    assert_eq!(refusal.object, "fd 4: /2");
    assert_eq!(refusal.holder, "pid 7 (test)");
    assert_eq!(refusal.remedy, "its path is gone");
}

#[test]
fn another_sort_of_eventfd_is_replaced() {
    let recorded = recorded([eventfd(3, true)]);
    let mut observed = unchanged(&recorded);
    observed.descriptions[0].state = Some(eventfd(3, false).state);
    let plan = plan(&recorded, &observed).unwrap();
    assert_eq!(plan.make, [(id(1), Source::New)]);
    assert!(plan.changes.is_empty() && plan.places.is_empty());
    assert_eq!(plan.tables[0].receive[0].0, id(1));
}

#[test]
fn an_external_pipe_is_kept_and_reported() {
    let end = Description {
        state: State::Pipe(crate::objects::pipe::State { fifo: None }),
        ..file(8)
    };
    let mut recorded = recorded([end]);
    let pipe = Pipe {
        inode: (5, 8),
        capacity: 4096,
        content: None,
    };
    recorded.pipes.insert(pipe.inode, pipe);
    let plan = plan(&recorded, &unchanged(&recorded)).unwrap();
    assert!(plan.is_empty());
    assert_eq!(plan.kept, ["fd 3 of pid 7 (test): pipe to the outside"]);
}

proptest! {
    /// Whatever flags, offset and count have become: what is planned leads back to the recorded ones, and nothing is
    /// planned where they are the same.
    #[test]
    fn settings_lead_back(
        (append, nonblocking, offset) in (any::<bool>(), any::<bool>(), 0i64..3),
        (append_now, nonblocking_now, offset_now) in (any::<bool>(), any::<bool>(), 0i64..3),
    ) {
        let flags = |append, nonblocking| {
            libc::O_RDWR
                | if append { libc::O_APPEND } else { 0 }
                | if nonblocking { libc::O_NONBLOCK } else { 0 }
        };
        let mut recorded = recorded([file(1)]);
        let then = &mut recorded.descriptions.get_mut(&id(1)).unwrap().common;
        (then.flags, then.offset) = (flags(append, nonblocking), offset);
        let mut observed = unchanged(&recorded);
        let now = &mut observed.descriptions[0].common;
        (now.flags, now.offset) = (flags(append_now, nonblocking_now), offset_now);
        let mut after = *now;
        let plan = plan(&recorded, &observed).unwrap();
        for (_, settle) in &plan.settle {
            after.flags = settle.flags.unwrap_or(after.flags);
            after.offset = settle.offset.unwrap_or(after.offset);
        }
        let then = recorded.descriptions[&id(1)].common;
        prop_assert_eq!(after, then);
        prop_assert_eq!(plan.is_empty(), observed.descriptions[0].common == then);
    }

    /// Whatever is open where: every recorded number is right, or there is a step that makes it so from something that is
    /// kept, stashed or received, and what is received is either made or fetched.
    #[test]
    fn every_number_has_a_source(live in proptest::collection::btree_map(0i32..9, 0usize..6, 0..9)) {
        let recorded = recorded([file(1), file(2), file(3), file(4)]);
        let mut observed = unchanged(&recorded);
        // Two strangers.
        for ino in [50, 51] {
            observed.descriptions.push(LiveDescription {
                place: Place { pid: 7, fd: 8 },
                common: common(ino),
                owner: None,
                is: None,
                state: None,
            });
        }
        observed.tables = vec![table(live.clone())];
        for index in 0..4 {
            if !live.values().any(|at| *at == index) {
                observed.descriptions[index].is = None;
                observed.gone.insert(id(index as u64 + 1), Source::Path(7));
            }
        }
        let plan = plan(&recorded, &observed).unwrap();
        let steps = plan.tables.first().cloned().unwrap_or_default();
        for slot in &recorded.tables[0].slots {
            let now = live.get(&slot.fd).and_then(|at| observed.descriptions[*at].is);
            let placed = steps.place.iter().any(|(_, to, _)| *to == slot.fd);
            prop_assert_eq!(now != Some(slot.description), placed);
        }
        for (received, _) in &steps.receive {
            let made = plan.make.iter().any(|(made, _)| made == received);
            prop_assert!(made != plan.fetch.contains_key(received));
        }
    }
}
