//! What the entries of a live epoll instance watch. Device and inode, which fdinfo shows, do not tell: both ends of a pipe
//! have one inode, and so have all eventfds.

use std::collections::BTreeMap;

use nix::unistd::Pid;

use super::Error;
use super::epoll::{State, kernel_device};
use super::live::Live;
use super::model::{Place, Table};
use crate::kernel::kcmp;

/// What an entry watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Watched {
    /// The live description; `None` if the tree does not have it (any more).
    pub live: Option<usize>,
    /// The instance, in a process in which the entry's number still is what it watches: there the entry can be deleted.
    pub at: Option<Place>,
}

/// Finds out what each entry of the instance `lives[index]` watches, in the order of `state`.
pub(super) fn watched(
    index: usize,
    state: &State,
    lives: &[Live<'_>],
    tables: &[Table<usize>],
) -> Result<Vec<Watched>, Error> {
    let instance = lives[index].place();
    let mut nth = BTreeMap::<i32, u32>::new();
    let mut found = Vec::with_capacity(state.entries.len());
    for entry in &state.entries {
        let occurrence = nth.entry(entry.fd).or_default();
        let look = |live: &Live<'_>| (kernel_device(live.common.dev), live.common.ino);
        let alike = |at: &usize| look(&lives[*at]) == entry.inode;
        let is_it = |at: usize| -> Result<bool, Error> {
            let socket = lives[at].common.file_type() == libc::S_IFSOCK;
            let place = |place: Place| (Pid::from_raw(place.pid), place.fd);
            // A socket has an inode to itself.
            Ok(socket
                || kcmp::epoll_watches(
                    place(instance),
                    entry.fd,
                    *occurrence,
                    place(lives[at].place()),
                )
                .map_err(lives[index].failed("kcmp"))?)
        };
        // Most entries watch what their number is.
        let mut candidates: Vec<usize> = tables
            .iter()
            .filter_map(|table| Some(table.at(entry.fd)?.description))
            .chain(0..lives.len())
            .filter(alike)
            .collect();
        let mut seen = vec![false; lives.len()];
        candidates.retain(|&at| !std::mem::replace(&mut seen[at], true));
        let mut live = None;
        for at in candidates {
            if is_it(at)? {
                live = Some(at);
                break;
            }
        }
        let at = live.and_then(|live| {
            tables
                .iter()
                .filter(|table| {
                    table
                        .at(entry.fd)
                        .is_some_and(|slot| slot.description == live)
                })
                .find_map(|table| {
                    let slot = table.slots.iter().find(|slot| slot.description == index)?;
                    Some(Place {
                        pid: table.pid(),
                        fd: slot.fd,
                    })
                })
        });
        found.push(Watched { live, at });
        *occurrence += 1;
    }
    Ok(found)
}
