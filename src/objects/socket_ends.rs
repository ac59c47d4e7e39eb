//! Who is connected to whom, within a tree.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;

use super::model::ObjectId;
use super::socket::{Role, State};
use crate::kernel::socket::Address;

/// Who is connected to whom, among the recorded.
pub(super) struct Ends {
    by_inode: HashMap<u64, ObjectId>,
    by_addresses: HashMap<(u64, SocketAddr, SocketAddr), ObjectId>,
}

/// An address without the difference between IPv4 and IPv4 mapped into IPv6.
pub(super) fn canonical(address: &Address) -> Option<SocketAddr> {
    address
        .inet()
        .map(|inet| SocketAddr::new(inet.ip().to_canonical(), inet.port()))
}

impl Ends {
    pub(super) fn new(recorded: &BTreeMap<ObjectId, &State>) -> Self {
        let mut ends = Self {
            by_inode: HashMap::new(),
            by_addresses: HashMap::new(),
        };
        for (&id, state) in recorded {
            ends.by_inode.insert(state.inode, id);
            if let (Role::Tcp(_), Some(local), Some(peer)) =
                (&state.role, canonical(&state.local), canonical(&state.peer))
            {
                ends.by_addresses.insert((state.namespace, local, peer), id);
            }
        }
        ends
    }

    /// The other end, if it was recorded as well.
    pub(super) fn of(&self, state: &State) -> Option<ObjectId> {
        match &state.role {
            Role::Unix { peer, .. } => self.by_inode.get(peer).copied(),
            Role::Tcp(_) => {
                let (local, peer) = (canonical(&state.local)?, canonical(&state.peer)?);
                self.by_addresses
                    .get(&(state.namespace, peer, local))
                    .copied()
            }
            _ => None,
        }
    }
}

/// The other end of each TCP connection that has both in the tree.
pub(super) fn inner_tcp(recorded: &BTreeMap<ObjectId, &State>) -> BTreeMap<ObjectId, ObjectId> {
    let ends = Ends::new(recorded);
    let inner = recorded
        .iter()
        .filter(|(_, state)| matches!(state.role, Role::Tcp(_)));
    inner
        .filter_map(|(&id, state)| Some((id, ends.of(state)?)))
        .collect()
}

/// Marks the connections that have both ends in the tree and, of unix, are open in both directions: nobody outside can
/// change them while the tree is stopped.
pub(super) fn mark_inner(states: &mut BTreeMap<ObjectId, State>) {
    let inner: Vec<bool> = {
        let borrowed = states.iter().map(|(&id, state)| (id, state)).collect();
        let ends = Ends::new(&borrowed);
        let is_inner = |state: &State| {
            let open = match state.role {
                Role::Unix { ended, .. } => ended == 0 && state.sort.kind != libc::SOCK_DGRAM,
                Role::Tcp(_) => true,
                _ => false,
            };
            open && ends.of(state).is_some()
        };
        states.values().map(is_inner).collect()
    };
    for (state, inner) in states.values_mut().zip(inner) {
        state.inner = inner;
    }
}
