//! Makes sockets again that are gone or can't be changed back.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::Error;
use super::execute::{Effects, Reach};
use super::model::ObjectId;
use super::socket::{Role, State, own};
use super::socket_apply::{drain_backlog, reset_at_close};
use super::socket_inside::Maker;
use super::socket_plan::{Plan, Recipe};
use super::socket_queue::fill;
use super::tcp_queue::fill_tcp;
use super::unix::{BoundFile, file_at, path_for_us};
use super::{socket_diag, survey, tcp, tcp_join, udp};
use crate::kernel::sock_diag::{SockDiag, state};
use crate::kernel::socket::{
    Address, accept, as_seen_by, bind, connect, create, listen, local_address, peer_address, poll,
    send, set_option, shutdown,
};

/// How long a reset may take over the loopback interface.
const DEADLINE: Duration = Duration::from_secs(2);

/// Where each recorded socket lives: a process whose root, directory and network namespace it has.
pub type Homes = BTreeMap<ObjectId, i32>;

/// Looks, before anything is touched, whether the names of those that must be made again are free: nothing else may be
/// at the path of a unix socket than the file of the recorded one, or one that nobody outside the tree listens at.
/// `inside` are the inodes of all sockets of the tree.
///
/// # Errors
/// The socket whose name is taken, and why.
pub fn check_names(
    plan: &Plan,
    recorded: &BTreeMap<ObjectId, &State>,
    homes: &Homes,
    inside: &BTreeSet<u64>,
) -> Result<(), (ObjectId, String)> {
    for (&id, recipe) in &plan.make {
        let (record, Some(&pid)) = (recorded[&id], homes.get(&id)) else {
            continue;
        };
        let (Recipe::Alone, Some(path)) = (recipe, record.local.unix_path()) else {
            continue;
        };
        let shown = String::from_utf8_lossy(path).into_owned();
        let found = std::fs::symlink_metadata(path_for_us(pid, path));
        match (found, file_at(pid, &record.local)) {
            (Err(error), _) if error.kind() == std::io::ErrorKind::NotFound => {}
            (Err(error), _) => return Err((id, format!("{shown}: {error}"))),
            (Ok(_), None) => return Err((id, format!("{shown} is no socket any more; remove it"))),
            (Ok(_), Some(file)) => {
                // The inode number alone tells nothing: it is given out again.
                let all = SockDiag::open_of(pid)
                    .and_then(|mut diag| diag.unix())
                    .map_err(|errno| (id, format!("sock_diag: {errno}")))?;
                let bound = |socket: &&crate::kernel::sock_diag::UnixSocket| {
                    socket
                        .file
                        .is_some_and(|(inode, _)| inode == file.inode as u32)
                };
                if all
                    .iter()
                    .filter(bound)
                    .any(|socket| !inside.contains(&u64::from(socket.inode)))
                {
                    return Err((
                        id,
                        format!("{shown} belongs to a process outside the tree now; stop that"),
                    ));
                }
            }
        }
    }
    Ok(())
}

/// The inodes of a process's sockets; none of one that is about to end.
pub(super) fn sockets_of(pid: i32) -> Vec<u64> {
    let numbers = survey::numbers(pid).unwrap_or_default();
    let found = numbers
        .into_iter()
        .filter_map(|fd| std::fs::metadata(format!("/proc/{pid}/fd/{fd}")).ok());
    found
        .filter(|at| at.mode() & libc::S_IFMT == libc::S_IFSOCK)
        .map(|at| at.ino())
        .collect()
}

/// Makes all sockets of the plan, in the keeper: one description each, to be passed into the tables.
///
/// # Errors
/// If the kernel refuses; nothing is in place then, but files of unix sockets may have been replaced.
pub fn make(
    plan: &Plan,
    recorded: &BTreeMap<ObjectId, &State>,
    homes: &Homes,
    reach: &Reach<'_>,
    maker: &mut dyn Maker,
    effects: &mut Effects,
) -> Result<BTreeMap<ObjectId, OwnedFd>, Error> {
    let mut made = BTreeMap::new();
    // A listener can't have its port while a new connection has it, but the other way round it can. Connections with a name
    // need their listener, which may itself be new.
    let turn = |recipe: &Recipe| match recipe {
        Recipe::Alone => 0,
        Recipe::Pair(_) | Recipe::PeerGone | Recipe::Reset => 1,
        Recipe::Through(..) | Recipe::PeerGoneThrough(_) => 2,
    };
    let mut todo: Vec<_> = plan.make.iter().collect();
    todo.sort_by_key(|(_, recipe)| turn(recipe));
    for (&id, recipe) in todo {
        let record = recorded[&id];
        let home = homes.get(&id).copied().ok_or(Error::Own {
            call: "finding a process",
            errno: Errno::ESRCH,
        })?;
        match *recipe {
            Recipe::Alone => {
                let socket = alone(record, home, recorded, reach)?;
                if let Some(backlog) = record.unix_backlog() {
                    maker.listen(who_made(record, home, maker), socket.as_fd(), backlog)?;
                }
                made.insert(id, socket);
            }
            Recipe::Pair(other) => {
                let (one, two) = match record.role {
                    Role::Tcp(_) => tcp_pair(record, recorded[&other], home)?,
                    _ => maker.pair(who_made(record, home, maker), record.sort.kind)?,
                };
                made.insert(id, one);
                made.insert(other, two);
            }
            Recipe::Through(listener, server) => {
                // The server's end was told who connected.
                let client = who_made(recorded[&server], home, maker);
                let listening = listening(&made, listener, reach)?;
                let (client_end, server_end) =
                    through(listening, recorded[&listener], client, home, maker, effects)?;
                made.insert(id, client_end);
                made.insert(server, server_end);
            }
            Recipe::PeerGoneThrough(listener) => {
                let listening = listening(&made, listener, reach)?;
                let is_server = record.local.unix_name().is_some();
                let client = match is_server {
                    true => who_made(record, home, maker),
                    false => home,
                };
                let (client_end, server_end) =
                    through(listening, recorded[&listener], client, home, maker, effects)?;
                let (ours, theirs) = match is_server {
                    true => (server_end, client_end),
                    false => (client_end, server_end),
                };
                fill(theirs.as_fd(), &record.queue, &Address::default()).map_err(own("sendmsg"))?;
                made.insert(id, ours);
            }
            Recipe::PeerGone if record.sort.family != libc::AF_UNIX => {
                made.insert(id, tcp_last(record, home)?);
            }
            Recipe::PeerGone => {
                let (one, two) = maker.pair(who_made(record, home, maker), record.sort.kind)?;
                fill(two.as_fd(), &record.queue, &Address::default()).map_err(own("sendmsg"))?;
                made.insert(id, one);
            }
            Recipe::Reset => {
                made.insert(id, reset(record, home, maker)?);
                effects.reset_connections += 1;
            }
        }
    }
    Ok(made)
}

/// A duplicate of a listener, which may be a new one.
fn listening(
    made: &BTreeMap<ObjectId, OwnedFd>,
    listener: ObjectId,
    reach: &Reach<'_>,
) -> Result<OwnedFd, Error> {
    match made.get(&listener) {
        Some(new) => new.try_clone().map_err(|_| own("dup")(Errno::EMFILE)),
        None => reach.duplicate(listener),
    }
}

/// A unix connection with a name: the client's end, made by `client`, and the server's.
fn through(
    listening: OwnedFd,
    record: &State,
    client: i32,
    home: i32,
    maker: &mut dyn Maker,
    effects: &mut Effects,
) -> Result<(OwnedFd, OwnedFd), Error> {
    // Whoever came since must go, and may leave no room.
    effects.reset_connections += drain_backlog(listening.as_fd())?;
    let client_end = maker.connected(client, record.sort.kind, &record.local)?;
    let server_end = accept_from(listening.as_fd(), &client_end, home)?;
    Ok((client_end, server_end))
}

/// Accepts the connection of a client of ours. Others come at any time from outside the tree: they are dropped.
fn accept_from(listener: BorrowedFd<'_>, client: &OwnedFd, home: i32) -> Result<OwnedFd, Error> {
    let inode = |fd: &OwnedFd| {
        let at = nix::sys::stat::fstat(fd.as_raw_fd()).map_err(own("fstat"))?;
        Ok::<_, Error>(at.st_ino)
    };
    let client = inode(client)?;
    loop {
        let accepted = accept(listener).map_err(own("accept4"))?;
        let server = accepted.ok_or(Error::Own {
            call: "accept4",
            errno: Errno::ECONNABORTED,
        })?;
        let found = socket_diag::unix(home, inode(&server)?)?;
        if found.is_some_and(|found| found.peer == Some(client as u32)) {
            return Ok(server);
        }
    }
}

/// A socket without a connection: bound, and listening if it did.
fn alone(
    record: &State,
    home: i32,
    recorded: &BTreeMap<ObjectId, &State>,
    reach: &Reach<'_>,
) -> Result<OwnedFd, Error> {
    let sort = record.sort;
    let socket = as_seen_by(home, || -> Result<OwnedFd, Error> {
        let socket = create(sort.family, sort.kind, sort.protocol).map_err(own("socket"))?;
        // Some options count only before the socket has an address (IPV6_V6ONLY, SO_REUSEADDR).
        record
            .options
            .restore(socket.as_fd(), sort)
            .map_err(|(call, errno)| Error::Own { call, errno })?;
        if let Some(path) = record.local.unix_path() {
            bind_to_file(socket.as_fd(), record, path)?;
        }
        Ok(socket)
    })
    .map_err(own("entering the process's namespaces"))??;
    match bind_and_listen(socket.as_fd(), record) {
        Err(Error::Own {
            errno: Errno::EADDRINUSE,
            ..
        }) if record.sort.protocol == libc::IPPROTO_TCP => {
            let shared = make_room(record, home, recorded, reach)?;
            share_port(socket.as_fd())?;
            bind_and_listen(socket.as_fd(), record)?;
            for (fd, state) in shared {
                state
                    .options
                    .restore(fd.as_fd(), state.sort)
                    .map_err(|(call, errno)| Error::Own { call, errno })?;
            }
        }
        other => other?,
    }
    Ok(socket)
}

/// Gives a socket its address, unless it has it, and lets it listen if the recorded one did.
fn bind_and_listen(socket: BorrowedFd<'_>, record: &State) -> Result<(), Error> {
    let now = local_address(socket).map_err(own("getsockname"))?;
    if is_bound(&record.local) && now != record.local {
        bind(socket, &record.local).map_err(own("bind"))?;
    }
    match record.role {
        // A unix socket listens once its process does it.
        Role::Listening { backlog, .. } if record.sort.family != libc::AF_UNIX => {
            listen(socket, backlog as i32).map_err(own("listen"))
        }
        _ => Ok(()),
    }
}

/// Whether an address is more than a family.
fn is_bound(local: &Address) -> bool {
    match (local.inet(), local.family()) {
        (Some(inet), _) => inet.port() != 0,
        (None, libc::AF_NETLINK) => local.0[4..].iter().any(|byte| *byte != 0),
        (None, _) => local.unix_name().is_some(),
    }
}

/// Binds to a path in place of the file that is there, with the same owner and permissions. Runs in the process's root.
fn bind_to_file(socket: BorrowedFd<'_>, record: &State, path: &[u8]) -> Result<(), Error> {
    use std::os::unix::ffi::OsStrExt;
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let failed = |call| {
        move |error: std::io::Error| {
            own(call)(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
        }
    };
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.mode() & libc::S_IFMT == libc::S_IFSOCK => {
            std::fs::remove_file(path).map_err(failed("unlink of a unix socket's file"))?;
        }
        _ => {}
    }
    bind(socket, &record.local).map_err(own("bind"))?;
    let Some(BoundFile { mode, uid, gid, .. }) = record.file else {
        // It had none any more.
        return std::fs::remove_file(path).map_err(failed("unlink of a unix socket's file"));
    };
    chown(path, Some(uid), Some(gid)).map_err(failed("chown of a unix socket's file"))?;
    let permissions = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(path, permissions).map_err(failed("chmod of a unix socket's file"))
}

/// Connections of the lost listener may keep its port: those without an owner are removed, and those that the tree keeps
/// are told to share it while bind(2) and listen(2) look. Returns these, whose options the caller puts back.
fn make_room<'a>(
    record: &State,
    home: i32,
    recorded: &BTreeMap<ObjectId, &'a State>,
    reach: &Reach<'_>,
) -> Result<Vec<(OwnedFd, &'a State)>, Error> {
    let port = |state: &State| state.local.inet().map(|inet| inet.port());
    let mut diag = SockDiag::open_of(home).map_err(own("sock_diag"))?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        for found in diag
            .inet(family, libc::IPPROTO_TCP)
            .map_err(own("sock_diag"))?
        {
            if found.inode == 0 && Some(found.local.port()) == port(record) {
                // It may be gone by itself in the meantime.
                let _ = diag.destroy(&found);
            }
        }
    }
    let mut shared = Vec::new();
    for (&id, &state) in recorded {
        if port(state) == port(record)
            && matches!(state.role, Role::Tcp(_))
            && reach.place(id).is_some()
        {
            let fd = reach.duplicate(id)?;
            share_port(fd.as_fd())?;
            shared.push((fd, state));
        }
    }
    Ok(shared)
}

fn share_port(fd: BorrowedFd<'_>) -> Result<(), Error> {
    set_option(
        fd,
        libc::SOL_SOCKET,
        libc::SO_REUSEADDR,
        &1i32.to_ne_bytes(),
    )
    .map_err(own("setsockopt"))
}

/// The process that made a unix socket, if it is still there; else one that has the socket.
fn who_made(record: &State, home: i32, maker: &dyn Maker) -> i32 {
    let made = record
        .credentials
        .map_or(home, |credentials| credentials.pid);
    if maker.reaches(made) { made } else { home }
}

/// Prepares sockets that are about to be closed because they came since: a TCP connection is reset by that, so that
/// nothing the program wrote since is sent any more. Returns how many connections these are.
///
/// # Errors
/// If the kernel refuses to tell.
pub fn condemn(sockets: &[OwnedFd]) -> Result<usize, Error> {
    let mut connections = BTreeSet::new();
    for socket in sockets {
        let fd = socket.as_fd();
        let Ok(info) = tcp::info(fd) else { continue };
        if matches!(info.state, state::LISTEN | state::CLOSE) {
            continue;
        }
        reset_at_close(fd)?;
        let local = local_address(fd).map_err(own("getsockname"))?.inet();
        let peer = peer_address(fd)
            .map_err(own("getpeername"))?
            .and_then(|peer| peer.inet());
        let canonical = |address: Option<std::net::SocketAddr>| {
            address.map(|address| (address.ip().to_canonical(), address.port()))
        };
        let (one, other) = (canonical(local), canonical(peer));
        // Both ends in the tree are one connection, of no concern to anybody else.
        if !connections.remove(&(other, one)) {
            connections.insert((one, other));
        }
    }
    Ok(connections.len())
}

/// A connection that is reset: the next read says `ECONNRESET`.
fn reset(record: &State, home: i32, maker: &mut dyn Maker) -> Result<OwnedFd, Error> {
    if record.sort.family == libc::AF_UNIX {
        let (one, two) = maker.pair(home, record.sort.kind)?;
        // A unix socket that is closed with something unread resets its peer (unix(7)).
        send(one.as_fd(), b"x", &Address::default(), None, &[]).map_err(own("sendmsg"))?;
        drop(two);
        return Ok(one);
    }
    let socket = create(record.sort.family, record.sort.kind, record.sort.protocol)
        .map_err(own("socket"))?;
    let listener = create(record.sort.family, record.sort.kind, record.sort.protocol)
        .map_err(own("socket"))?;
    bind(listener.as_fd(), &loopback(record.sort.family)).map_err(own("bind"))?;
    listen(listener.as_fd(), 1).map_err(own("listen"))?;
    let address = local_address(listener.as_fd()).map_err(own("getsockname"))?;
    match connect(socket.as_fd(), &address) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(errno) => {
            return Err(Error::Own {
                call: "connect",
                errno,
            });
        }
    }
    let accepted = wait_for(|| accept(listener.as_fd()), "accept4")?;
    reset_at_close(accepted.as_fd())?;
    drop(accepted);
    wait_for(|| Ok(poll(socket.as_fd())?.1.then_some(())), "poll")?;
    Ok(socket)
}

/// Any port of the loopback address; of IPv6 the one mapped from IPv4, as `::1` may be switched off.
fn loopback(family: i32) -> Address {
    let mut bytes = vec![0u8; if family == libc::AF_INET { 16 } else { 28 }];
    bytes[..2].copy_from_slice(&(family as u16).to_ne_bytes());
    match family {
        libc::AF_INET => bytes[4..8].copy_from_slice(&[127, 0, 0, 1]),
        _ => bytes[18..24].copy_from_slice(&[0xff, 0xff, 127, 0, 0, 1]),
    }
    Address(bytes)
}

fn wait_for<T>(
    mut ask: impl FnMut() -> nix::Result<Option<T>>,
    call: &'static str,
) -> Result<T, Error> {
    let started = Instant::now();
    loop {
        match ask().map_err(own(call))? {
            Some(answer) => return Ok(answer),
            None if started.elapsed() > DEADLINE => {
                return Err(Error::Own {
                    call,
                    errno: Errno::ETIMEDOUT,
                });
            }
            None => std::thread::yield_now(),
        }
    }
}

/// A TCP connection with both ends in one namespace, with the recorded addresses and without a packet sent: both are
/// told by `TCP_REPAIR` where the other is (Linux 3.5).
fn tcp_pair(one: &State, two: &State, home: i32) -> Result<(OwnedFd, OwnedFd), Error> {
    remove_remains(one, two, home)?;
    as_seen_by(home, || {
        let ends = [create_repairing(one)?, create_repairing(two)?];
        tcp_join::join(
            ends[0].as_fd(),
            &one.local,
            &one.peer,
            ends[1].as_fd(),
            &two.local,
            &two.peer,
        )
        .map_err(own("joining a TCP connection"))?;
        for (fd, state) in ends.iter().zip([one, two]) {
            // What had arrived has to arrive again, more than the first window; options go back afterwards.
            let queued: usize = state.queue.iter().map(|message| message.data.len()).sum();
            if let Role::Tcp(connection) = &state.role
                && queued == connection.unread as usize
                && queued > 0
            {
                udp::make_room(fd.as_fd()).map_err(own("setsockopt"))?;
            }
        }
        let [first, second] = ends;
        Ok((first, second))
    })
    .map_err(own("entering the process's namespaces"))?
}

/// The end of a TCP connection whose other end was closed, with what waits; closed itself if the recorded one was.
fn tcp_last(record: &State, home: i32) -> Result<OwnedFd, Error> {
    let mut ours = record.clone();
    if ours.peer.0.is_empty() {
        // Nobody can ask any more who it was.
        ours.peer = free_address(record.sort.family, home)?;
    }
    let theirs = State {
        local: ours.peer.clone(),
        peer: ours.local.clone(),
        ..record.clone()
    };
    let (one, other) = tcp_pair(&ours, &theirs, home)?;
    // More than the first window.
    udp::make_room(one.as_fd()).map_err(own("setsockopt"))?;
    for message in &record.queue {
        fill_tcp(other.as_fd(), one.as_fd(), &message.data)
            .map_err(own("putting queued TCP data back"))?;
    }
    shutdown(other.as_fd(), libc::SHUT_WR).map_err(own("shutdown"))?;
    wait_for(|| Ok(poll(one.as_fd())?.1.then_some(())), "poll")?;
    if matches!(record.role, Role::Plain { .. }) {
        shutdown(one.as_fd(), libc::SHUT_WR).map_err(own("shutdown"))?;
        let closed = || Ok((tcp::info(one.as_fd())?.state == state::CLOSE).then_some(()));
        wait_for(closed, "TCP_INFO")?;
    }
    Ok(one)
}

/// A loopback address of a port that is free.
fn free_address(family: i32, home: i32) -> Result<Address, Error> {
    as_seen_by(home, || {
        let socket = create(family, libc::SOCK_STREAM, libc::IPPROTO_TCP)?;
        bind(socket.as_fd(), &loopback(family))?;
        local_address(socket.as_fd())
    })
    .map_err(own("entering the process's namespaces"))?
    .map_err(own("bind"))
}

fn create_repairing(record: &State) -> Result<OwnedFd, Error> {
    create(record.sort.family, record.sort.kind, record.sort.protocol).map_err(own("socket"))
}

/// What is left of a connection keeps its addresses: the end that is still open, or one that lingers without an owner.
fn remove_remains(one: &State, two: &State, home: i32) -> Result<(), Error> {
    let (Some(a), Some(b)) = (one.local.inet(), two.local.inet()) else {
        return Ok(());
    };
    let canonical = |address: std::net::SocketAddr| (address.ip().to_canonical(), address.port());
    let mut diag = SockDiag::open_of(home).map_err(own("sock_diag"))?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        for found in diag
            .inet(family, libc::IPPROTO_TCP)
            .map_err(own("sock_diag"))?
        {
            let ends = (canonical(found.local), canonical(found.remote));
            if ends == (canonical(a), canonical(b)) || ends == (canonical(b), canonical(a)) {
                match diag.destroy(&found) {
                    Ok(()) | Err(Errno::ENOENT) => {}
                    Err(errno) => {
                        return Err(Error::Own {
                            call: "SOCK_DESTROY",
                            errno,
                        });
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "socket_make_tests.rs"]
mod tests;
