//! The oracle for sockets: compares what the kernel reports about a live socket (sock_diag(7)) with its record.

use std::os::fd::AsFd;

use super::Error;
use super::live::Live;
use super::socket::{Role, State};
use super::socket_diag;
use super::socket_options::Options;
use super::tcp;
use crate::kernel::sock_diag::{InetSocket, state};
use crate::kernel::socket::{SO_COOKIE, local_address, peer_address, receive, u64_option};

/// What differs, in words. A connection that was reset is reported by the rollback and not looked at here.
///
/// The outside goes on while the tree is stopped: it may send, close its end, or connect to a listener at any moment, as it
/// may a moment after the rollback. That is no difference.
pub(super) fn verify(record: &State, live: &Live<'_>) -> Result<Vec<String>, Error> {
    if record.role == Role::Reset {
        return Ok(Vec::new());
    }
    let duplicate = live.duplicate()?;
    let fd = duplicate.as_fd();
    let cookie = u64_option(fd, libc::SOL_SOCKET, SO_COOKIE).map_err(live.failed("getsockopt"))?;
    let mut differences = Vec::new();
    let mut expect = |what: &str, same: bool, recorded: String, now: String| {
        if !same {
            differences.push(format!("{what}: {recorded} at the checkpoint, {now} now"));
        }
    };
    let local = local_address(fd).map_err(live.failed("getsockname"))?;
    let outside = !record.inner;
    match record.sort.family {
        libc::AF_UNIX => {
            let found = socket_diag::unix(live.holder.pid, live.common.ino)?;
            let Some(found) = found.filter(|found| found.cookie == cookie) else {
                return Ok(vec!["not in the kernel's list of unix sockets".into()]);
            };
            let (recorded_state, ended) = match &record.role {
                Role::Listening { .. } => (state::LISTEN, 0),
                Role::Unix { ended, .. } if record.sort.kind != libc::SOCK_DGRAM => {
                    (state::ESTABLISHED, *ended)
                }
                Role::Unix { ended, .. } | Role::Plain { ended } => (found.state, *ended),
                Role::Tcp(_) | Role::Reset => (found.state, found.shutdown),
            };
            expect(
                "state",
                recorded_state == found.state,
                recorded_state.to_string(),
                found.state.to_string(),
            );
            let closed_outside = outside && found.shutdown & ended == ended;
            expect(
                "shut down",
                ended == found.shutdown || closed_outside,
                ended.to_string(),
                found.shutdown.to_string(),
            );
            if let Role::Listening { backlog, waiting } = &record.role {
                expect(
                    "backlog",
                    *backlog == found.send_queue,
                    backlog.to_string(),
                    found.send_queue.to_string(),
                );
                let still = |client: &u64| found.pending.contains(&(*client as u32));
                expect(
                    "waiting connections",
                    waiting.iter().all(still),
                    format!("{waiting:?}"),
                    format!("{:?}", found.pending),
                );
            }
            if let Role::Unix { peer: 1.., .. } = record.role {
                let connected = found.peer.is_some_and(|peer| peer != 0) || outside;
                expect(
                    "peer",
                    connected,
                    "connected".into(),
                    "not connected".into(),
                );
            }
            let name = record.local.unix_name().map(<[u8]>::to_vec);
            expect(
                "name",
                name == found.name,
                format!("{name:?}"),
                format!("{:?}", found.name),
            );
            let queued = if record.sort.kind == libc::SOCK_DGRAM {
                record.queue.first().map_or(0, |message| message.data.len())
            } else {
                record.queue.iter().map(|message| message.data.len()).sum()
            };
            if !record.listens() {
                let now = found.receive_queue as usize;
                expect(
                    "bytes to be read",
                    queued == now || outside && (queued < now || queued == 0),
                    queued.to_string(),
                    now.to_string(),
                );
            }
        }
        libc::AF_INET | libc::AF_INET6
            if matches!(record.sort.protocol, libc::IPPROTO_TCP | libc::IPPROTO_UDP)
                && record.sort.kind != libc::SOCK_RAW =>
        {
            let all = socket_diag::inet(live.holder.pid, record.sort.family, record.sort.protocol)?;
            let found = all.iter().find(|socket| socket.cookie == cookie);
            inet(record, found, &mut expect);
            let connection = matches!(record.role, Role::Tcp(_));
            if !connection {
                expect(
                    "address",
                    record.local == local,
                    format!("{:?}", record.local.inet()),
                    format!("{:?}", local.inet()),
                );
                let peer = peer_address(fd)
                    .map_err(live.failed("getpeername"))?
                    .unwrap_or_default();
                expect(
                    "peer",
                    record.peer == peer,
                    format!("{:?}", record.peer.inet()),
                    format!("{:?}", peer.inet()),
                );
            }
        }
        _ => expect(
            "address",
            record.local == local,
            format!("{:?}", record.local),
            format!("{local:?}"),
        ),
    }
    // The first bytes of the queue, by a plain look.
    if let Some(first) = record.queue.first() {
        let seen = receive(fd, first.data.len(), libc::MSG_PEEK).map_err(live.failed("recvmsg"))?;
        let data = seen.unwrap_or_default().data;
        let same = data.is_empty() == first.data.is_empty() && first.data.starts_with(&data);
        expect(
            &format!("queued data of {}", record.describe()),
            same,
            format!("{} bytes", first.data.len()),
            format!("{} bytes or others", data.len()),
        );
    }
    let options = match record.role {
        Role::Tcp(_) => record.options.read_again(fd, record.sort),
        _ => Options::read(fd, record.sort),
    };
    let mut options = options.map_err(live.failed("getsockopt"))?;
    if matches!(record.role, Role::Tcp(_)) {
        options = options.of_connection(record.sort);
    }
    let differing = record.options.differences(&options, record.sort);
    expect(
        "options",
        differing.is_empty(),
        "as recorded".into(),
        format!("different: {}", differing.join(", ")),
    );
    Ok(differences)
}

/// An internet socket against the kernel's report. A connection that is closed was reset.
fn inet(
    record: &State,
    found: Option<&InetSocket>,
    expect: &mut impl FnMut(&str, bool, String, String),
) {
    match (&record.role, found) {
        (Role::Listening { backlog, .. }, Some(now)) => {
            expect(
                "state",
                now.state == state::LISTEN,
                "listening".into(),
                now.state.to_string(),
            );
            expect(
                "backlog",
                *backlog == now.send_queue,
                backlog.to_string(),
                now.send_queue.to_string(),
            );
        }
        (Role::Listening { .. }, None) => {
            expect("state", false, "listening".into(), "closed".into())
        }
        (Role::Tcp(connection), Some(now)) => {
            expect(
                "state",
                connection.phase() == tcp::phase(now.state)
                    || !record.inner && matches!(now.state, state::CLOSE | state::CLOSE_WAIT),
                connection.state.to_string(),
                now.state.to_string(),
            );
            let addresses = (record.local.inet(), record.peer.inet());
            // While it is being made getpeername(2) knows of no peer.
            let same = addresses == (Some(now.local), Some(now.remote))
                || connection.state == state::SYN_SENT && addresses.0 == Some(now.local);
            expect(
                "addresses",
                same,
                format!("{addresses:?}"),
                format!("{:?}", (now.local, now.remote)),
            );
        }
        (Role::Plain { .. }, Some(now)) if record.sort.protocol == libc::IPPROTO_TCP => {
            expect(
                "state",
                // What lingers of it in the kernel goes by the same name.
                matches!(now.state, state::CLOSE | state::TIME_WAIT),
                "closed".into(),
                now.state.to_string(),
            );
        }
        _ => {}
    }
}
