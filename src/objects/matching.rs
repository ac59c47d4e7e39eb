//! Which live description is which recorded one. Pure.
//!
//! Nothing names a description for longer than it is open, so this goes by what a description is on (its inode and access
//! mode, and its kind or cookie) and where it is: first at a number where it was recorded, then anywhere. What else it has
//! (offset, flags, count …) can be changed to what was recorded, so that a wrong guess between two that are alike does no
//! harm.

use std::collections::BTreeMap;

use super::model::{ObjectId, Place, Table};

/// For each live description the recorded one that it is; `alike` says whether they can be the same.
pub fn matching(
    recorded: &[Table<ObjectId>],
    live: &[Table<usize>],
    descriptions: usize,
    mut alike: impl FnMut(ObjectId, usize) -> bool,
) -> Vec<Option<ObjectId>> {
    let mut is: Vec<Option<ObjectId>> = vec![None; descriptions];
    let mut found = BTreeMap::new();
    let mut missing: BTreeMap<ObjectId, Vec<Place>> = BTreeMap::new();
    for (table, live) in recorded.iter().zip(live) {
        for slot in &table.slots {
            if found.contains_key(&slot.description) {
                continue;
            }
            if let Some(at) = live.at(slot.fd)
                && is[at.description].is_none()
                && alike(slot.description, at.description)
            {
                is[at.description] = Some(slot.description);
                found.insert(slot.description, at.description);
                missing.remove(&slot.description);
            } else {
                let place = Place {
                    pid: table.pid(),
                    fd: slot.fd,
                };
                missing.entry(slot.description).or_default().push(place);
            }
        }
    }
    for id in missing.into_keys() {
        let candidates = live
            .iter()
            .flat_map(|table| &table.slots)
            .map(|slot| slot.description);
        let free = candidates
            .into_iter()
            .find(|&at| is[at].is_none() && alike(id, at));
        if let Some(at) = free {
            is[at] = Some(id);
        }
    }
    is
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::model::Slot;

    fn table<D>(slots: impl IntoIterator<Item = (i32, D)>) -> Table<D> {
        let slot = |(fd, description)| Slot {
            fd,
            close_on_exec: false,
            description,
        };
        Table {
            holders: vec![1],
            slots: slots.into_iter().map(slot).collect(),
        }
    }

    fn id(raw: u64) -> ObjectId {
        ObjectId::from_raw(raw).unwrap()
    }

    #[test]
    fn what_moved_is_found_and_a_stranger_is_not() {
        let recorded = [table([(3, id(1)), (4, id(2)), (5, id(2))])];
        // 1 moved to 9; 3 is a stranger; 4 was closed, 5 is as it was.
        let live = [table([(3, 0), (5, 1), (9, 2)])];
        let alike = |id: ObjectId, at: usize| matches!((id.raw(), at), (1, 2) | (2, 1));
        assert_eq!(
            matching(&recorded, &live, 3, alike),
            [None, Some(id(2)), Some(id(1))]
        );
    }

    #[test]
    fn each_is_matched_once() {
        let recorded = [table([(3, id(1)), (4, id(2))])];
        let live = [table([(3, 0), (4, 0)])];
        assert_eq!(matching(&recorded, &live, 1, |_, _| true), [Some(id(1))]);
    }
}
