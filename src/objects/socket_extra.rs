//! What some sockets have besides options: a filter, netlink groups, multicast memberships, half a datagram, urgent data.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::Error;
use super::live::Live;
use super::model::ObjectId;
use super::multicast;
use super::socket::{State, own};
use super::socket_apply::{Change, Step};
use super::socket_options::Sort;
use super::socket_plan::{Obstacle, Plan};
use crate::kernel::multicast::Membership;
use crate::kernel::socket::{int_option, option, set_option, unsent};
use crate::kernel::socket_filter;

/// What a socket has besides options.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Extra {
    /// Its filter.
    pub filter: Filter,
    /// The filter can't be changed any more (`SO_LOCK_FILTER`).
    pub locked: bool,
    /// Netlink groups it listens to, a bit each.
    pub groups: Vec<u8>,
    /// Multicast groups.
    pub memberships: Vec<Membership>,
    /// It holds a datagram that is not sent yet (`UDP_CORK`, `MSG_MORE`).
    pub half_sent: bool,
    /// It has urgent data that was not read yet.
    pub urgent: bool,
}

/// A filter.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Filter {
    /// There is none.
    #[default]
    None,
    /// A classic BPF program.
    Classic(Vec<u64>),
    /// An eBPF program, which can't be read.
    Opaque,
}

/// How long a datagram on its way out may take before it counts as one that is held back.
const ON_ITS_WAY: Duration = Duration::from_millis(2);
/// `linux/netlink.h`.
const NETLINK_ADD_MEMBERSHIP: i32 = 1;
const NETLINK_DROP_MEMBERSHIP: i32 = 2;
const NETLINK_LIST_MEMBERSHIPS: i32 = 9;
/// Why a queue can't be put back.
const IN_FLIGHT: &str = "descriptors waited in it (SCM_RIGHTS), and what waits there has changed since the checkpoint, so that \
                         they can't be put back; take the checkpoint when the receiver has read them";
/// More groups than any family has.
const MOST_GROUPS: usize = 256;

thread_local! {
    /// The multicast groups of network namespaces (by the process asked for) in this pass.
    static GROUPS: RefCell<BTreeMap<i32, Rc<BTreeSet<Membership>>>> = const { RefCell::new(BTreeMap::new()) };
}

/// Forgets what was read of network namespaces.
pub(super) fn close() {
    GROUPS.with_borrow_mut(BTreeMap::clear);
}

fn groups_of(pid: i32) -> Rc<BTreeSet<Membership>> {
    GROUPS.with_borrow_mut(|groups| {
        let found = groups.entry(pid);
        Rc::clone(found.or_insert_with(|| Rc::new(multicast::groups_of(pid))))
    })
}

fn read_filter(fd: BorrowedFd<'_>) -> nix::Result<Filter> {
    match socket_filter::read(fd) {
        Ok(program) if program.is_empty() => Ok(Filter::None),
        Ok(program) => Ok(Filter::Classic(program)),
        Err(Errno::EACCES) => Ok(Filter::Opaque),
        Err(errno) => Err(errno),
    }
}

fn is_urgent(fd: BorrowedFd<'_>) -> nix::Result<bool> {
    let mut fds = [PollFd::new(fd, PollFlags::POLLPRI)];
    poll(&mut fds, PollTimeout::ZERO)?;
    let events = fds[0].revents().unwrap_or(PollFlags::empty());
    Ok(events.contains(PollFlags::POLLPRI))
}

/// A datagram may be on its way through a device; one that is held back stays.
fn is_half_sent(fd: BorrowedFd<'_>) -> nix::Result<bool> {
    for _ in 0..2 {
        if unsent(fd)? == 0 {
            return Ok(false);
        }
        std::thread::sleep(ON_ITS_WAY);
    }
    Ok(unsent(fd)? > 0)
}

fn read_groups(fd: BorrowedFd<'_>) -> nix::Result<Vec<u8>> {
    let mut groups = vec![0; MOST_GROUPS / 8];
    let length = option(fd, libc::SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, &mut groups)?;
    groups.truncate(length);
    while groups.last() == Some(&0) {
        groups.pop();
    }
    Ok(groups)
}

/// Reads all of a live socket.
pub(super) fn read(live: &Live<'_>, fd: BorrowedFd<'_>, sort: Sort) -> Result<Extra, Error> {
    let failed = live.failed("getsockopt");
    let filter = read_filter(fd).map_err(&failed)?;
    let inet = matches!(sort.family, libc::AF_INET | libc::AF_INET6);
    Ok(Extra {
        locked: filter != Filter::None
            && int_option(fd, libc::SOL_SOCKET, libc::SO_LOCK_FILTER).map_err(&failed)? != 0,
        filter,
        groups: match sort.family {
            libc::AF_NETLINK => read_groups(fd).map_err(&failed)?,
            _ => Vec::new(),
        },
        memberships: match sort.kind {
            libc::SOCK_DGRAM | libc::SOCK_RAW if inet => {
                let groups = groups_of(live.holder.pid);
                multicast::memberships(fd, sort.family, &groups).map_err(&failed)?
            }
            _ => Vec::new(),
        },
        half_sent: inet
            && sort.protocol == libc::IPPROTO_UDP
            && is_half_sent(fd).map_err(live.failed("SIOCOUTQ"))?,
        urgent: inet
            && sort.protocol == libc::IPPROTO_TCP
            && is_urgent(fd).map_err(live.failed("poll"))?,
    })
}

/// Records it, or refuses what can't be put back.
pub(super) fn capture(live: &Live<'_>, fd: BorrowedFd<'_>, sort: Sort) -> Result<Extra, Error> {
    let extra = read(live, fd, sort)?;
    let (what, remedy) = match (extra.half_sent, extra.urgent) {
        (true, _) => (
            "UDP socket with half a datagram (UDP_CORK, MSG_MORE)",
            "take the checkpoint when it is sent",
        ),
        (_, true) => (
            "TCP socket with urgent data (MSG_OOB) that waits to be read",
            "take the checkpoint when the program has read it",
        ),
        _ => return Ok(extra),
    };
    Err(live.refuse(what, remedy).into())
}

impl Extra {
    /// Whether `now` must be changed.
    fn differs(&self, now: &Self) -> Result<bool, &'static str> {
        let filters = (&self.filter, &now.filter);
        match filters {
            // Whether it is the same can't be told.
            (Filter::Opaque, Filter::Opaque) => {}
            (Filter::Opaque, _) => {
                return Err("its filter, an eBPF program, was taken away since the checkpoint");
            }
            (one, other) if one != other && now.locked => {
                return Err("its filter was locked since the checkpoint (SO_LOCK_FILTER)");
            }
            _ if now.locked && !self.locked => {
                return Err("its filter was locked since the checkpoint (SO_LOCK_FILTER)");
            }
            _ => {}
        }
        Ok(filters.0 != filters.1
            || (&self.groups, &self.memberships) != (&now.groups, &now.memberships))
    }

    /// Why a socket that has this can't be made again.
    pub(super) fn irreplaceable(&self) -> Option<String> {
        (self.filter == Filter::Opaque).then(|| "it has a filter made of eBPF".into())
    }

    /// Takes a filter away, if there is one that can be: what is put back has passed it before.
    pub(super) fn unfilter(fd: BorrowedFd<'_>) -> Result<(), Error> {
        if let Filter::Classic(_) = read_filter(fd).map_err(own("SO_GET_FILTER"))? {
            let none = 0i32.to_ne_bytes();
            match set_option(fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &none) {
                Ok(()) | Err(Errno::EPERM) => {}
                Err(errno) => return Err(own("SO_DETACH_FILTER")(errno)),
            }
        }
        Ok(())
    }

    /// Gives a socket of this sort all it had.
    pub(super) fn apply(&self, fd: BorrowedFd<'_>, sort: Sort, pid: i32) -> Result<(), Error> {
        let now = read_filter(fd).map_err(own("SO_GET_FILTER"))?;
        match &self.filter {
            filter if *filter == now => {}
            Filter::None => {
                let none = 0i32.to_ne_bytes();
                set_option(fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &none)
                    .map_err(own("SO_DETACH_FILTER"))?;
            }
            Filter::Classic(program) => {
                socket_filter::attach(fd, program).map_err(own("SO_ATTACH_FILTER"))?;
            }
            Filter::Opaque => {}
        }
        if self.locked {
            let on = 1i32.to_ne_bytes();
            set_option(fd, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, &on)
                .map_err(own("SO_LOCK_FILTER"))?;
        }
        if sort.family == libc::AF_NETLINK {
            self.apply_groups(fd)?;
        }
        if matches!(sort.kind, libc::SOCK_DGRAM | libc::SOCK_RAW)
            && matches!(sort.family, libc::AF_INET | libc::AF_INET6)
        {
            let mut candidates = multicast::groups_of(pid);
            candidates.extend(&self.memberships);
            let now = multicast::memberships(fd, sort.family, &candidates)
                .map_err(own("MCAST_MSFILTER"))?;
            multicast::set(fd, &self.memberships, &now).map_err(own("MCAST_JOIN_GROUP"))?;
        }
        Ok(())
    }

    fn apply_groups(&self, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let now = read_groups(fd).map_err(own("NETLINK_LIST_MEMBERSHIPS"))?;
        let has = |groups: &[u8], bit: usize| {
            groups
                .get(bit / 8)
                .is_some_and(|byte| byte >> (bit % 8) & 1 != 0)
        };
        for bit in 0..MOST_GROUPS {
            let name = match (has(&self.groups, bit), has(&now, bit)) {
                (true, false) => NETLINK_ADD_MEMBERSHIP,
                (false, true) => NETLINK_DROP_MEMBERSHIP,
                _ => continue,
            };
            let group = (bit as u32 + 1).to_ne_bytes();
            set_option(fd, libc::SOL_NETLINK, name, &group)
                .map_err(own("NETLINK_ADD_MEMBERSHIP"))?;
        }
        Ok(())
    }
}

/// Plans what must be done about it, once it is known what else must be done.
pub(super) fn plan(
    recorded: &BTreeMap<ObjectId, &State>,
    now: &BTreeMap<ObjectId, &State>,
    plan: &mut Plan,
) -> Result<(), Obstacle> {
    for (&id, record) in recorded {
        let same = now.get(&id).filter(|now| now.cookie == record.cookie);
        let differs =
            match same {
                Some(now) if !plan.replaced.contains(&id) => record
                    .extra
                    .differs(&now.extra)
                    .map_err(|remedy| Obstacle {
                        id,
                        remedy: remedy.to_owned(),
                    })?,
                _ => plan.replaced.contains(&id) && record.extra != Extra::default(),
            };
        let filtered = record.extra.filter != Filter::None
            || same.is_some_and(|now| now.extra.filter != Filter::None);
        let change = plan.changes.get_mut(&id);
        let in_flight = record
            .queue
            .iter()
            .any(|message| !message.rights.is_empty());
        let is_queue = |step: &Step| matches!(step, Step::Queue(_));
        let is_filled = change
            .as_ref()
            .is_some_and(|change| change.steps.iter().any(is_queue));
        if in_flight && (is_filled || plan.replaced.contains(&id)) {
            return Err(Obstacle {
                id,
                remedy: IN_FLIGHT.to_owned(),
            });
        }
        let refilled = change.is_some_and(|change| {
            let refilled = filtered && is_filled;
            if refilled {
                change.steps.push(Step::Unfilter);
            }
            refilled
        });
        if differs || refilled {
            let change = plan.changes.entry(id).or_insert_with(|| Change {
                record: Box::new((*record).clone()),
                steps: Vec::new(),
            });
            change.steps.push(Step::Extra);
        }
    }
    Ok(())
}
