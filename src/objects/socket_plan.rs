//! What to do about sockets, decided over all of them: both ends of a connection go back together. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::model::ObjectId;
use super::socket::{Role, State};
use super::socket_apply::{Change, Step};
use super::socket_ends::{Ends, canonical};
use super::{socket_extra, socket_queue};
use crate::kernel::sock_diag::state;
use crate::kernel::socket::{Address, Message};

/// How a socket that must be made again is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recipe {
    /// On its own: a listener, a datagram socket, a stream socket without a connection.
    Alone,
    /// With its other end, by socketpair(2) or as a TCP connection to itself.
    Pair(ObjectId),
    /// The client end of a connection with a name: through the listener, with the other end accepted.
    Through(ObjectId, ObjectId),
    /// One whose peer was gone: its end, and what waits before it.
    PeerGone,
    /// A unix socket whose peer was gone, of a connection with a name: through the listener.
    PeerGoneThrough(ObjectId),
    /// A connection to the outside that can't be had back: one that is reset.
    Reset,
}

/// What has to be done about the sockets of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Those to be made again, also of those that are there. Of a pair one end stands for both.
    pub make: BTreeMap<ObjectId, Recipe>,
    /// All that are made again: the new ones take the place of the old under every number.
    pub replaced: BTreeSet<ObjectId>,
    /// What to do to each socket once all are in place.
    pub changes: BTreeMap<ObjectId, Change>,
}

/// Why a socket can't be brought back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// The socket.
    pub id: ObjectId,
    /// What is wrong and what to do about it.
    pub remedy: String,
}

/// Plans all sockets: `recorded` against those that are still there.
///
/// # Errors
/// The first socket that can't be brought back.
pub fn plan(
    recorded: &BTreeMap<ObjectId, &State>,
    now: &BTreeMap<ObjectId, &State>,
) -> Result<Plan, Obstacle> {
    let mut planner = Planner {
        recorded,
        now,
        ends: Ends::new(recorded),
        waited_for: waited_for(recorded),
        plan: Plan::default(),
    };
    for (&id, &record) in recorded {
        planner.socket(id, record)?;
    }
    planner.follow_replaced()?;
    let mut plan = planner.plan;
    socket_extra::plan(recorded, now, &mut plan)?;
    // Connections and options come before the messages that need them.
    for change in plan.changes.values_mut() {
        change.steps.sort_by_key(Step::order);
    }
    Ok(plan)
}

struct Planner<'a> {
    recorded: &'a BTreeMap<ObjectId, &'a State>,
    now: &'a BTreeMap<ObjectId, &'a State>,
    ends: Ends,
    /// Listeners for which connections wait.
    waited_for: Vec<(ObjectId, &'a State)>,
    plan: Plan,
}

fn waited_for<'a>(recorded: &BTreeMap<ObjectId, &'a State>) -> Vec<(ObjectId, &'a State)> {
    let waits = |state: &State| matches!(&state.role, Role::Listening { waiting, .. } if !waiting.is_empty());
    let sockets = recorded.iter().map(|(id, state)| (*id, *state));
    sockets.filter(|(_, state)| waits(state)).collect()
}

impl<'a> Planner<'a> {
    /// The socket now, if it is the same one.
    fn now(&self, id: ObjectId) -> Option<&'a State> {
        self.now
            .get(&id)
            .copied()
            .filter(|now| now.cookie == self.recorded[&id].cookie)
    }

    fn socket(&mut self, id: ObjectId, record: &'a State) -> Result<(), Obstacle> {
        if self.plan.replaced.contains(&id) {
            // With its other end.
            return Ok(());
        }
        if let Some(now) = self.now(id)
            && !record.options.same(&now.options)
        {
            self.step(id, Step::Options);
        }
        match (&record.role, record.sort.family, record.sort.kind) {
            (_, libc::AF_NETLINK, _) => self.netlink(id, record),
            (Role::Listening { backlog, waiting }, ..) => {
                self.listener(id, record, *backlog, waiting)
            }
            (Role::Tcp(_), ..) => self.tcp(id, record),
            (Role::Reset, ..) if self.now(id).is_some() => Ok(()),
            (Role::Reset, ..) => self.make(id, Recipe::Reset),
            (_, _, libc::SOCK_DGRAM | libc::SOCK_RAW) => self.datagram(id, record),
            (Role::Unix { peer, ended }, ..) => self.unix_connection(id, record, *peer, *ended),
            (Role::Plain { ended }, ..) => {
                let same = self.now(id).is_some_and(|now| {
                    (&now.role, &now.local) == (&record.role, &record.local)
                        && socket_queue::same(&record.queue, &now.queue, record.shape())
                });
                match (
                    same,
                    record.sort.protocol == libc::IPPROTO_TCP && *ended != 0,
                ) {
                    (true, _) => Ok(()),
                    (false, true) => self.make(id, Recipe::PeerGone),
                    (false, false) => self.make(id, Recipe::Alone),
                }
            }
        }
    }

    fn step(&mut self, id: ObjectId, step: Step) {
        let change = self.plan.changes.entry(id).or_insert_with(|| Change {
            record: Box::new(self.recorded[&id].clone()),
            steps: Vec::new(),
        });
        if !change.steps.contains(&step) {
            change.steps.push(step);
        }
    }

    /// Plans to make a socket again, and its other end with it.
    fn make(&mut self, id: ObjectId, recipe: Recipe) -> Result<(), Obstacle> {
        if self.plan.replaced.contains(&id) {
            return Ok(());
        }
        let mut ends = vec![id];
        if let Recipe::Pair(other) | Recipe::Through(_, other) = recipe {
            ends.push(other);
        }
        for end in ends {
            if let Some(why) = &self.recorded[&end].irreplaceable
                && recipe != Recipe::Reset
            {
                return Err(refuse(
                    end,
                    &format!("{why}, so that it can't be made again"),
                ));
            }
        }
        self.renew(id, recipe);
        if let Recipe::Pair(other) | Recipe::Through(_, other) = recipe {
            self.renew(other, recipe);
        }
        self.plan.make.insert(id, recipe);
        Ok(())
    }

    /// Plans what has to be put on a socket that is made again.
    fn renew(&mut self, id: ObjectId, recipe: Recipe) {
        let record = self.recorded[&id];
        self.plan.replaced.insert(id);
        self.plan.changes.remove(&id);
        if recipe == Recipe::Reset {
            return;
        }
        self.step(id, Step::Options);
        if matches!(recipe, Recipe::PeerGone | Recipe::PeerGoneThrough(_)) {
            return;
        }
        let ends = match &record.role {
            Role::Plain { ended } | Role::Unix { ended, .. } => *ended,
            Role::Tcp(connection) => connection.ended(),
            Role::Listening { .. } | Role::Reset => 0,
        };
        if ends != 0 {
            self.step(id, Step::Shutdown(ends));
        }
        if !record.queue.is_empty() {
            let senders = self.senders(id, record);
            self.step(id, Step::Queue(senders));
        }
    }

    fn netlink(&mut self, id: ObjectId, record: &State) -> Result<(), Obstacle> {
        match self.now(id) {
            None => self.make(id, Recipe::Alone),
            Some(now) if netlink_port(&now.local) != netlink_port(&record.local) => {
                self.make(id, Recipe::Alone)
            }
            Some(now) => {
                if now.role != record.role {
                    self.step(id, Step::Queue(Vec::new()));
                }
                Ok(())
            }
        }
    }

    fn listener(
        &mut self,
        id: ObjectId,
        record: &State,
        backlog: u32,
        waiting: &[u64],
    ) -> Result<(), Obstacle> {
        match self.now(id).map(|now| &now.role) {
            Some(Role::Listening {
                backlog: now_backlog,
                waiting: now_waiting,
            }) => {
                if *now_backlog != backlog {
                    self.step(id, Step::Backlog(backlog));
                }
                if now_waiting != waiting {
                    self.nobody_inside_waited(id, record)?;
                    self.step(id, Step::DrainBacklog);
                }
                Ok(())
            }
            _ => {
                self.nobody_inside_waited(id, record)?;
                self.make(id, Recipe::Alone)
            }
        }
    }

    /// A connection that waited to be accepted, of a client inside, can't be put back into the backlog.
    fn nobody_inside_waited(&self, listener: ObjectId, record: &State) -> Result<(), Obstacle> {
        let waits = |(&id, &client): (&ObjectId, &&State)| {
            (self.waits_for(client) == Some(listener)).then_some(id)
        };
        match self.recorded.iter().find_map(waits) {
            Some(client) => Err(refuse(
                client,
                &format!(
                    "it waited to be accepted by {} at the checkpoint and was accepted since; take the checkpoint \
                     when no connection waits",
                    record.describe()
                ),
            )),
            None => Ok(()),
        }
    }

    /// The recorded listener in whose backlog this client waited.
    fn waits_for(&self, client: &State) -> Option<ObjectId> {
        let listens_for = |listener: &State| {
            let Role::Listening { waiting, .. } = &listener.role else {
                return false;
            };
            match &client.role {
                Role::Unix { peer: 0, ended } if *ended != 3 => waiting.contains(&client.inode),
                Role::Tcp(_) if self.ends.of(client).is_none() => {
                    let port = |address: &Address| address.inet().map(|inet| inet.port());
                    !waiting.is_empty()
                        && listener.namespace == client.namespace
                        && port(&listener.local) == port(&client.peer)
                        && port(&client.peer).is_some()
                }
                _ => false,
            }
        };
        let mut listeners = self.waited_for.iter();
        listeners
            .find(|(_, state)| listens_for(state))
            .map(|(id, _)| *id)
    }

    fn unix_connection(
        &mut self,
        id: ObjectId,
        record: &'a State,
        peer: u64,
        ended: u8,
    ) -> Result<(), Obstacle> {
        let now = self.now(id);
        // A connected socket can get a name: by bind(2), or when it sends with SO_PASSCRED (unix(7)).
        let as_it_was =
            now.is_some_and(|now| (&now.role, &now.local) == (&record.role, &record.local));
        let queue_same =
            now.is_some_and(|now| socket_queue::same(&record.queue, &now.queue, record.shape()));
        if let Some(other) = self.ends.of(record) {
            return match (as_it_was, queue_same) {
                (true, true) => Ok(()),
                (true, false) if ended == 0 => {
                    let senders = vec![Some(other); record.queue.len()];
                    self.step(id, Step::Queue(senders));
                    Ok(())
                }
                _ => self.make_unix_pair(id, record, other),
            };
        }
        if let Some(listener) = self.waits_for(record) {
            let still = as_it_was
                && self
                    .now(listener)
                    .is_some_and(|l| l.role == self.recorded[&listener].role);
            return if still {
                Ok(())
            } else {
                self.nobody_inside_waited(listener, self.recorded[&listener])
            };
        }
        match (as_it_was && queue_same, peer == 0 && ended == 3) {
            (true, _) => Ok(()),
            (false, true) => self.make_unix_last(id, record),
            (false, false) if now.is_none() => self.make(id, Recipe::Reset),
            (false, false) => {
                self.step(id, Step::Abort);
                Ok(())
            }
        }
    }

    /// The two ends of a connection inside: a plain pair, or if it has a name, one through the listener of that name.
    fn make_unix_pair(
        &mut self,
        id: ObjectId,
        record: &State,
        other: ObjectId,
    ) -> Result<(), Obstacle> {
        let other_record = self.recorded[&other];
        let name = |state: &State| state.local.unix_name().map(<[u8]>::to_vec);
        let (client, server, listener_name) = match (name(record), name(other_record)) {
            (None, None) => return self.make(id, Recipe::Pair(other)),
            (None, Some(name)) => (id, other, name),
            (Some(name), None) => (other, id, name),
            (Some(_), Some(_)) => {
                return Err(refuse(id, TWO_NAMES));
            }
        };
        let listener = self.listener_called(&listener_name, record);
        match listener {
            Some(listener) => {
                self.nobody_inside_waited(listener, self.recorded[&listener])?;
                self.make(client, Recipe::Through(listener, server))
            }
            None => Err(refuse(id, NO_LISTENER)),
        }
    }

    /// The last end of a unix connection.
    fn make_unix_last(&mut self, id: ObjectId, record: &State) -> Result<(), Obstacle> {
        let name = match (record.local.unix_name(), record.peer.unix_name()) {
            (None, None) => return self.make(id, Recipe::PeerGone),
            (Some(name), None) | (None, Some(name)) => name,
            (Some(_), Some(_)) => return Err(refuse(id, TWO_NAMES)),
        };
        match self.listener_called(name, record) {
            Some(listener) => {
                self.nobody_inside_waited(listener, self.recorded[&listener])?;
                self.make(id, Recipe::PeerGoneThrough(listener))
            }
            None => Err(refuse(id, NO_LISTENER)),
        }
    }

    /// The recorded unix listener of a name at which `client` or its peer can have connected.
    fn listener_called(&self, name: &[u8], client: &State) -> Option<ObjectId> {
        let is_it = |state: &State| {
            state.listens()
                && state.namespace == client.namespace
                && state.sort == client.sort
                && state.local.unix_name() == Some(name)
        };
        let mut all = self.recorded.iter();
        all.find(|(_, state)| is_it(state)).map(|(&id, _)| id)
    }

    fn tcp(&mut self, id: ObjectId, record: &'a State) -> Result<(), Obstacle> {
        let Role::Tcp(before) = &record.role else {
            return Ok(());
        };
        let now = self.now(id).and_then(|now| match &now.role {
            Role::Tcp(connection) => Some((now, connection)),
            _ => None,
        });
        if let Some(other) = self.ends.of(record) {
            let same = |now: &State| socket_queue::same(&record.queue, &now.queue, record.shape());
            return match now.filter(|(now, _)| !now.extra.urgent) {
                Some((now, connection)) if connection.is_open_like(before) && same(now) => Ok(()),
                Some((now, connection))
                    if connection.is_open_like(before)
                        && before.state == state::ESTABLISHED
                        && self.may_write(other) =>
                {
                    // What does not fit into a small window now would come only bit by bit.
                    if now.options.sets_receive_buffer()
                        && record.irreplaceable.is_none()
                        && self.is_blocked(other)
                    {
                        return self.make(id, Recipe::Pair(other));
                    }
                    // Named also if nothing waited: what is on the way from it must be taken.
                    self.step(id, Step::Queue(vec![Some(other)]));
                    Ok(())
                }
                _ => self.make(id, Recipe::Pair(other)),
            };
        }
        if before.peer_gone {
            let same = now.is_some_and(|(now, connection)| {
                connection.is_open_like(before)
                    && socket_queue::same(&record.queue, &now.queue, record.shape())
            });
            return if same {
                Ok(())
            } else {
                self.make(id, Recipe::PeerGone)
            };
        }
        let kept = now.is_some_and(|(_, connection)| {
            let idle = connection.is_idle() && before.is_idle();
            connection.is_where(before) || idle && connection.is_open_like(before)
        });
        if let Some(listener) = self.waits_for(record) {
            let still = kept
                && self
                    .now(listener)
                    .is_some_and(|l| l.role == self.recorded[&listener].role);
            return if still {
                Ok(())
            } else {
                self.nobody_inside_waited(listener, self.recorded[&listener])
            };
        }
        match (kept, self.now(id).is_some()) {
            (true, _) => Ok(()),
            (false, true) => {
                self.step(id, Step::Abort);
                Ok(())
            }
            (false, false) => self.make(id, Recipe::Reset),
        }
    }

    /// Whether this end of a TCP connection is open: its own end may be under way still, so that the other does not show it.
    fn may_write(&self, writer: ObjectId) -> bool {
        let role = self.now(writer).map(|now| &now.role);
        matches!(role, Some(Role::Tcp(connection)) if connection.state == state::ESTABLISHED)
    }

    /// Whether this end of a TCP connection, which can be replaced, now has written what its reader has no room for.
    fn is_blocked(&self, writer: ObjectId) -> bool {
        let role = self.now(writer).map(|now| &now.role);
        let has_more = matches!(role, Some(Role::Tcp(connection)) if connection.not_sent > 0);
        has_more && self.recorded[&writer].irreplaceable.is_none()
    }

    fn datagram(&mut self, id: ObjectId, record: &'a State) -> Result<(), Obstacle> {
        let other = self.ends.of(record);
        // An unnamed peer can't be connected to again, only made together with this one.
        let paired = other.filter(|&other| {
            self.recorded[&other].local.unix_name().is_none()
                && self.ends.of(self.recorded[&other]) == Some(id)
        });
        let ended = |state: &State| match state.role {
            Role::Unix { ended, .. } | Role::Plain { ended } => ended,
            _ => 0,
        };
        let now = self
            .now(id)
            .filter(|now| now.local == record.local && ended(now) == ended(record))
            // What it holds back would be sent.
            .filter(|now| !now.extra.half_sent);
        let connected = |state: &State| match state.role {
            Role::Unix { peer, .. } => (peer, Address::default()),
            _ => (0, state.peer.clone()),
        };
        let Some(now) = now else {
            return self.make_datagram(id, record, other, paired);
        };
        if connected(now) != connected(record) {
            if paired.is_some() {
                return self.make_datagram(id, record, other, paired);
            }
            Self::check_peer_has_a_name(id, record)?;
            self.step(id, Step::Connect);
        }
        if !socket_queue::same(&record.queue, &now.queue, record.shape()) {
            if Self::has_lost_its_peer(record) && !record.queue.is_empty() {
                return self.make(id, Recipe::PeerGone);
            }
            let senders = self.senders(id, record);
            self.step(id, Step::Queue(senders));
        }
        Ok(())
    }

    /// Whether it is the last of a pair of datagram sockets, to which nobody can send any more.
    fn has_lost_its_peer(record: &State) -> bool {
        matches!(record.role, Role::Unix { peer: 0, .. })
            && record.local.unix_name().is_none()
            && record
                .queue
                .iter()
                .all(|message| message.source.unix_name().is_none())
    }

    fn make_datagram(
        &mut self,
        id: ObjectId,
        record: &State,
        other: Option<ObjectId>,
        paired: Option<ObjectId>,
    ) -> Result<(), Obstacle> {
        if let Some(other) = paired {
            return self.make(id, Recipe::Pair(other));
        }
        let unnamed_outside = matches!(record.role, Role::Unix { .. })
            && other.is_none()
            && record.peer.unix_name().is_none();
        if unnamed_outside && Self::has_lost_its_peer(record) {
            return self.make(id, Recipe::PeerGone);
        }
        if unnamed_outside {
            return self.make(id, Recipe::Reset);
        }
        Self::check_peer_has_a_name(id, record)?;
        self.make(id, Recipe::Alone)?;
        if !record.peer.0.is_empty() {
            self.step(id, Step::Connect);
        }
        Ok(())
    }

    /// A unix socket without a name can't be connected to; socketpair(2) does it for both ends only.
    fn check_peer_has_a_name(id: ObjectId, record: &State) -> Result<(), Obstacle> {
        let is_nameless = record.sort.family == libc::AF_UNIX
            && !record.peer.0.is_empty()
            && record.peer.unix_name().is_none();
        if is_nameless {
            return Err(refuse(
                id,
                "it was connected to a socket without a name that was not connected to it; the connection or that socket is \
                 gone since, and it can't be connected again",
            ));
        }
        Ok(())
    }

    /// Who sent each message that waits: the recorded socket with the source's address, or one without a name that is
    /// connected to the receiver.
    fn senders(&self, receiver: ObjectId, record: &State) -> Vec<Option<ObjectId>> {
        record
            .queue
            .iter()
            .map(|message| self.sender(receiver, record, message))
            .collect()
    }

    fn sender(&self, receiver: ObjectId, record: &State, message: &Message) -> Option<ObjectId> {
        let connected_pair = self.ends.of(record).filter(|&other| {
            record.sort.kind != libc::SOCK_DGRAM
                || self.ends.of(self.recorded[&other]) == Some(receiver)
        });
        let from = |state: &State| match record.sort.family {
            libc::AF_UNIX => match message.source.unix_name() {
                Some(name) => state.local.unix_name() == Some(name),
                None => {
                    state.local.unix_name().is_none()
                        && matches!(state.role, Role::Unix { peer, .. } if peer == record.inode)
                }
            },
            _ => match (canonical(&state.local), canonical(&message.source)) {
                (Some(local), Some(source)) => {
                    local.port() == source.port()
                        && (local.ip() == source.ip() || local.ip().is_unspecified())
                }
                _ => false,
            },
        };
        let alike = |state: &State| {
            (state.sort.kind, state.sort.protocol, state.namespace)
                == (record.sort.kind, record.sort.protocol, record.namespace)
                && state.sort.family.cmp(&libc::AF_UNIX) == record.sort.family.cmp(&libc::AF_UNIX)
        };
        let found = self
            .recorded
            .iter()
            .find(|(_, state)| alike(state) && from(state))
            .map(|(&id, _)| id);
        match (record.sort.family, record.sort.kind) {
            // Raw and ICMP sockets send other things than they receive.
            (libc::AF_INET | libc::AF_INET6, _) if !record.is_udp() => connected_pair,
            (_, libc::SOCK_DGRAM) => found.or(connected_pair),
            _ => connected_pair,
        }
    }

    /// Datagram sockets that are connected to one that is made again connect again.
    fn follow_replaced(&mut self) -> Result<(), Obstacle> {
        let followers: Vec<_> = self
            .recorded
            .iter()
            .filter(|(id, state)| {
                state.sort.kind == libc::SOCK_DGRAM
                    && state.sort.family == libc::AF_UNIX
                    && !self.plan.replaced.contains(id)
                    && self
                        .ends
                        .of(state)
                        .is_some_and(|other| self.plan.replaced.contains(&other))
            })
            .map(|(&id, _)| id)
            .collect();
        for id in followers {
            Self::check_peer_has_a_name(id, self.recorded[&id])?;
            self.step(id, Step::Connect);
        }
        Ok(())
    }
}

impl Plan {
    /// Tells the record what the rollback made of it, so that the next one knows the sockets again: `made` are cookie and
    /// inode of each new socket. A connection that was reset stays so.
    pub fn adopt(
        &self,
        states: &mut BTreeMap<ObjectId, &mut State>,
        made: &BTreeMap<ObjectId, (u64, u64)>,
    ) {
        let mut inodes = HashMap::new();
        for (id, &(cookie, inode)) in made {
            if let Some(state) = states.get_mut(id) {
                inodes.insert(state.inode, inode);
                (state.cookie, state.inode) = (cookie, inode);
            }
        }
        let was_aborted = |id| {
            self.changes
                .get(id)
                .is_some_and(|change: &Change| change.steps.contains(&Step::Abort))
        };
        for (id, state) in states {
            if self.make.get(id) == Some(&Recipe::Reset) || was_aborted(id) {
                (state.role, state.queue) = (Role::Reset, Vec::new());
                state.peer = Address::default();
            }
            match &mut state.role {
                Role::Unix { peer, .. } => *peer = *inodes.get(peer).unwrap_or(peer),
                Role::Listening { waiting, .. } if state.sort.family == libc::AF_UNIX => {
                    for client in waiting {
                        *client = *inodes.get(client).unwrap_or(client);
                    }
                }
                _ => {}
            }
        }
    }
}

const TWO_NAMES: &str = "both ends of it have names; it can't be connected again";
const NO_LISTENER: &str = "the connection ended since the checkpoint, and its listener is not in the tree, so that it \
                           can't be connected again";

/// The number of a netlink socket (netlink(7)); its groups are apart.
fn netlink_port(address: &Address) -> Option<&[u8]> {
    address.0.get(4..8)
}

fn refuse(id: ObjectId, remedy: &str) -> Obstacle {
    Obstacle {
        id,
        remedy: remedy.to_owned(),
    }
}

#[cfg(test)]
#[path = "socket_plan_tests.rs"]
mod tests;
