//! What must be done to a table so that its numbers are as recorded. Pure.
//!
//! The steps, in this order: numbers that are not recorded are closed; descriptions that are there, but only at wrong
//! numbers, are duplicated to spare numbers; descriptions that come from outside the table are received, each at a spare
//! number; every wrong number gets its description by dup3(2), which closes what was there; spare numbers are closed;
//! close-on-exec bits are set. So cycles need no care: a number is overwritten only when what was there is elsewhere too
//! or not wanted.

use std::collections::{BTreeMap, BTreeSet};

use super::model::{Complaint, ObjectId, Table};

/// What must be done to one table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TablePlan {
    /// Process through which it is done (host PID).
    pub pid: i32,
    /// Numbers to close first.
    pub close: Vec<i32>,
    /// From a wrong number to a spare one.
    pub stash: Vec<(i32, i32)>,
    /// Numbers to close when all is stashed.
    pub close_stashed: Vec<i32>,
    /// Descriptions that come from outside, each with its spare number.
    pub receive: Vec<(ObjectId, i32)>,
    /// From a number (spare or right) to a wrong or closed one, with its close-on-exec bit.
    pub place: Vec<(i32, i32, bool)>,
    /// Close-on-exec bits that are wrong at numbers that are right.
    pub close_on_exec: Vec<(i32, bool)>,
}

impl TablePlan {
    /// Whether nothing must be done.
    pub fn is_empty(&self) -> bool {
        self.close.is_empty()
            && self.stash.is_empty()
            && self.receive.is_empty()
            && self.place.is_empty()
            && self.close_on_exec.is_empty()
    }

    /// The spare numbers, to be closed in the end.
    pub fn spare(&self) -> impl Iterator<Item = i32> {
        let received = self.receive.iter().map(|(_, spare)| *spare);
        self.stash.iter().map(|(_, spare)| *spare).chain(received)
    }
}

/// Numbers in use for a moment while descriptions are received: both ends of a socket pair, and what has just come.
const PASSAGE: usize = 3;

/// Plans a table. `is` says which recorded description a live one is; `limit` is `RLIMIT_NOFILE`.
pub fn plan(
    recorded: &Table<ObjectId>,
    live: &Table<usize>,
    is: impl Fn(usize) -> Option<ObjectId>,
    limit: u64,
) -> Result<TablePlan, Complaint> {
    let mut plan = TablePlan {
        pid: recorded.pid(),
        ..TablePlan::default()
    };
    let right = |fd: i32, id: ObjectId| live.at(fd).filter(|slot| is(slot.description) == Some(id));
    // Where each description can be had: at a number that is right, or any other.
    let mut right_at = BTreeMap::new();
    for slot in &recorded.slots {
        if right(slot.fd, slot.description).is_some() {
            right_at.entry(slot.description).or_insert(slot.fd);
        }
    }
    let mut wrong_at = BTreeMap::new();
    for slot in &live.slots {
        if let Some(id) = is(slot.description) {
            wrong_at.entry(id).or_insert(slot.fd);
        }
    }
    let recorded_numbers: BTreeSet<i32> = recorded.slots.iter().map(|slot| slot.fd).collect();
    let live_numbers: BTreeSet<i32> = live.slots.iter().map(|slot| slot.fd).collect();

    let mut stash: BTreeMap<ObjectId, i32> = BTreeMap::new();
    let mut receive: Vec<ObjectId> = Vec::new();
    let mut wrong = Vec::new();
    for slot in &recorded.slots {
        if let Some(found) = right(slot.fd, slot.description) {
            if found.close_on_exec != slot.close_on_exec {
                plan.close_on_exec.push((slot.fd, slot.close_on_exec));
            }
            continue;
        }
        wrong.push(slot);
        let id = slot.description;
        if right_at.contains_key(&id) || stash.contains_key(&id) || receive.contains(&id) {
            continue;
        }
        match wrong_at.get(&id) {
            Some(&fd) => {
                stash.insert(id, fd);
            }
            None => receive.push(id),
        }
    }
    for &fd in live_numbers.difference(&recorded_numbers) {
        if stash.values().any(|&from| from == fd) {
            plan.close_stashed.push(fd);
        } else {
            plan.close.push(fd);
        }
    }

    let mut taken: BTreeSet<i32> = recorded_numbers.clone();
    taken.extend(
        live_numbers
            .iter()
            .filter(|fd| plan.close.binary_search(fd).is_err()),
    );
    let mut spare_at = BTreeMap::new();
    let mut highest = -1;
    for (&id, &from) in &stash {
        let spare = lowest_free(&taken);
        taken.insert(spare);
        plan.stash.push((from, spare));
        spare_at.insert(id, spare);
    }
    if !receive.is_empty() {
        // The kernel gives them the lowest numbers that are free then.
        let mut open: BTreeSet<i32> = live_numbers
            .intersection(&recorded_numbers)
            .copied()
            .collect();
        open.extend(spare_at.values());
        for _ in 0..PASSAGE {
            let landing = lowest_free(&open);
            open.insert(landing);
            taken.insert(landing);
            highest = highest.max(landing);
        }
        for id in receive {
            let spare = lowest_free(&taken);
            taken.insert(spare);
            plan.receive.push((id, spare));
            spare_at.insert(id, spare);
        }
    }
    for slot in wrong {
        let from = right_at
            .get(&slot.description)
            .or_else(|| spare_at.get(&slot.description));
        if let Some(&from) = from {
            plan.place.push((from, slot.fd, slot.close_on_exec));
        }
    }
    highest = plan
        .spare()
        .chain(plan.place.iter().map(|(_, to, _)| *to))
        .fold(highest, i32::max);
    if u64::try_from(highest).is_ok_and(|highest| highest >= limit) {
        let remedy = format!("number {highest} is needed, but RLIMIT_NOFILE is {limit}: raise it");
        return Err(("file table".into(), remedy));
    }
    Ok(plan)
}

fn lowest_free(taken: &BTreeSet<i32>) -> i32 {
    let mut free = 0;
    for &fd in taken {
        if fd > free {
            break;
        }
        free = fd + 1;
    }
    free
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::objects::model::Slot;

    /// A table of a small kernel: number to description and close-on-exec bit. Descriptions from outside are the ids.
    type Kernel = BTreeMap<i32, (u64, bool)>;

    fn insert_lowest(kernel: &mut Kernel, what: u64) -> i32 {
        let free = lowest_free(&kernel.keys().copied().collect());
        kernel.insert(free, (what, true));
        free
    }

    /// Carries the plan out as `execute` does, checking that nothing is used that is not there.
    fn carry_out(plan: &TablePlan, kernel: &mut Kernel, from_outside: impl Fn(ObjectId) -> u64) {
        let close = |kernel: &mut Kernel, fd: i32| {
            kernel
                .remove(&fd)
                .unwrap_or_else(|| panic!("{fd} is not open"));
        };
        let dup = |kernel: &mut Kernel, from: i32, to: i32, close_on_exec: bool| {
            assert_ne!(from, to);
            let what = kernel[&from].0;
            kernel.insert(to, (what, close_on_exec));
        };
        plan.close.iter().for_each(|&fd| close(kernel, fd));
        for &(from, spare) in &plan.stash {
            assert!(!kernel.contains_key(&spare), "{spare} is in use");
            dup(kernel, from, spare, true);
        }
        plan.close_stashed.iter().for_each(|&fd| close(kernel, fd));
        if !plan.receive.is_empty() {
            let sockets = [insert_lowest(kernel, 0), insert_lowest(kernel, 0)];
            for &(id, spare) in &plan.receive {
                let landed = insert_lowest(kernel, from_outside(id));
                assert!(!kernel.contains_key(&spare), "{spare} is in use");
                dup(kernel, landed, spare, true);
                close(kernel, landed);
            }
            sockets.into_iter().for_each(|fd| close(kernel, fd));
        }
        for &(from, to, close_on_exec) in &plan.place {
            dup(kernel, from, to, close_on_exec);
        }
        plan.spare().for_each(|fd| close(kernel, fd));
        for &(fd, close_on_exec) in &plan.close_on_exec {
            kernel.get_mut(&fd).unwrap().1 = close_on_exec;
        }
    }

    fn table<D>(slots: impl Iterator<Item = (i32, D, bool)>) -> Table<D> {
        let slots = slots.map(|(fd, description, close_on_exec)| Slot {
            fd,
            close_on_exec,
            description,
        });
        Table {
            holders: vec![1],
            slots: slots.collect(),
        }
    }

    proptest! {
        /// Whatever the numbers were and are: afterwards they are as recorded. Live descriptions 1 to 5 are recorded
        /// ones, from 101 on foreign; recorded 6 and 7 are nowhere in the table.
        #[test]
        fn any_table_becomes_any_other(
            recorded in proptest::collection::btree_map(0i32..14, (1u64..8, any::<bool>()), 0..12),
            live in proptest::collection::btree_map(
                0i32..14,
                (prop_oneof![1u64..6, 101u64..104], any::<bool>()),
                0..12,
            ),
        ) {
            let recorded_table = table(recorded.iter().map(|(&fd, &(what, close_on_exec))| {
                (fd, ObjectId::from_raw(what).unwrap(), close_on_exec)
            }));
            let live_table = table(
                live.iter().map(|(&fd, &(what, close_on_exec))| (fd, what as usize, close_on_exec)),
            );
            let is = |what: usize| if what <= 5 { ObjectId::from_raw(what as u64) } else { None };
            let plan = plan(&recorded_table, &live_table, is, 1024).unwrap();
            let mut kernel = live.clone();
            carry_out(&plan, &mut kernel, ObjectId::raw);
            prop_assert_eq!(&kernel, &recorded);
            prop_assert_eq!(plan.is_empty(), live == recorded);
        }
    }

    #[test]
    fn a_swap_needs_one_spare_number_each() {
        let id = |raw| ObjectId::from_raw(raw).unwrap();
        let recorded = table([(3, id(1), false), (4, id(2), true)].into_iter());
        let live = table([(3, 2, false), (4, 1, false)].into_iter());
        let plan = plan(
            &recorded,
            &live,
            |what| ObjectId::from_raw(what as u64),
            1024,
        )
        .unwrap();
        assert_eq!(plan.stash, [(4, 0), (3, 1)]);
        assert_eq!(plan.place, [(0, 3, false), (1, 4, true)]);
    }

    #[test]
    fn a_limit_that_is_too_low_is_named() {
        let id = |raw| ObjectId::from_raw(raw).unwrap();
        let recorded = table([(0, id(1), false), (1, id(2), false)].into_iter());
        let live = table([(0, 2, false), (1, 1, false)].into_iter());
        let (object, remedy) =
            plan(&recorded, &live, |what| ObjectId::from_raw(what as u64), 3).unwrap_err();
        assert_eq!(object, "file table");
        assert!(remedy.contains("RLIMIT_NOFILE is 3"), "{remedy}");
    }
}
