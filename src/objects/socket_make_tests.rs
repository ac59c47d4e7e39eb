//! Sockets of this very process: recorded, wrecked, put back.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::atomic::{AtomicI32, Ordering};

use super::*;
use crate::kernel::socket::{SO_COOKIE, option, shutdown, u64_option};
use crate::objects::live::{Holder, Live};
use crate::objects::model::{Common, Place};
use crate::objects::socket_apply::Step;
use crate::objects::socket_apply::apply;
use crate::objects::socket_ends::{inner_tcp, mark_inner};
use crate::objects::socket_inside::Keeper;
use crate::objects::socket_plan::plan;
use crate::objects::tcp_queue::complete;

/// Recorded sockets of this process, by number.
struct Recorded {
    holders: BTreeMap<i32, Holder>,
    fds: BTreeMap<ObjectId, RawFd>,
    states: BTreeMap<ObjectId, State>,
}

fn live(holder: &Holder, fd: RawFd) -> Live<'_> {
    let stat = nix::sys::stat::fstat(fd).expect("fstat");
    let common = Common {
        flags: 0,
        offset: 0,
        dev: stat.st_dev,
        ino: stat.st_ino,
        mode: stat.st_mode,
        rdev: 0,
    };
    Live::new(holder, fd, common, crate::objects::live::Glance::default())
}

fn borrow(states: &BTreeMap<ObjectId, State>) -> BTreeMap<ObjectId, &State> {
    states.iter().map(|(&id, state)| (id, state)).collect()
}

impl Recorded {
    fn capture(fds: &[RawFd]) -> Self {
        let pid = std::process::id() as i32;
        let holders = BTreeMap::from([(pid, Holder::new(pid, "test"))]);
        let fds: BTreeMap<ObjectId, RawFd> =
            fds.iter().enumerate().map(|(i, &fd)| (id(i), fd)).collect();
        let states = fds
            .iter()
            .map(|(&id, &fd)| {
                (
                    id,
                    crate::objects::socket::capture(&live(&holders[&pid], fd)).expect("capture"),
                )
            })
            .collect();
        let mut recorded = Self {
            holders,
            fds,
            states,
        };
        let ends = inner_tcp(&borrow(&recorded.states));
        let mut states = std::mem::take(&mut recorded.states);
        mark_inner(&mut states);
        complete(&mut states, &ends, &BTreeMap::new(), |id| {
            recorded.duplicate(id)
        })
        .expect("complete");
        recorded.states = states;
        recorded
    }

    fn holder(&self) -> &Holder {
        self.holders.values().next().expect("one")
    }

    fn duplicate(&self, id: ObjectId) -> Result<OwnedFd, Error> {
        self.holder().duplicate(self.fds[&id])
    }

    /// What is still there of the recorded, among these descriptors.
    fn observe(&self, there: &[RawFd]) -> BTreeMap<ObjectId, State> {
        let mut now = BTreeMap::new();
        for (&id, &fd) in self.fds.iter().filter(|(_, fd)| there.contains(fd)) {
            now.insert(
                id,
                self.states[&id]
                    .observe(&live(self.holder(), fd))
                    .expect("observe"),
            );
        }
        let ends = inner_tcp(&borrow(&self.states));
        complete(&mut now, &ends, &borrow(&self.states), |id| {
            self.duplicate(id)
        })
        .expect("complete");
        now
    }

    /// Puts everything back; returns what was done.
    fn roll_back(&mut self, there: &[RawFd]) -> (Plan, Effects) {
        let now = self.observe(there);
        let recorded = borrow(&self.states);
        let planned = plan(&recorded, &borrow(&now)).expect("plan");
        let homes: Homes = self.fds.keys().map(|&id| (id, self.holder().pid)).collect();
        check_names(&planned, &recorded, &homes, &BTreeSet::new()).expect("names");
        let mut effects = Effects::default();
        let place = |fd: RawFd| Place {
            pid: self.holder().pid,
            fd,
        };
        let mut reach = Reach {
            holders: &self.holders,
            places: BTreeMap::new(),
        };
        for (&id, &fd) in self.fds.iter().filter(|(_, fd)| there.contains(fd)) {
            reach.places.insert(id, place(fd));
        }
        let made = make(
            &planned,
            &recorded,
            &homes,
            &reach,
            &mut Keeper,
            &mut effects,
        )
        .expect("make");
        let mut identities = BTreeMap::new();
        for (id, new) in made {
            let fd = self.fds[&id];
            let inode = nix::sys::stat::fstat(new.as_raw_fd())
                .expect("fstat")
                .st_ino;
            let cookie = u64_option(new.as_fd(), libc::SOL_SOCKET, SO_COOKIE).expect("cookie");
            identities.insert(id, (cookie, inode));
            nix::unistd::dup2(new.as_raw_fd(), fd).expect("dup2");
            reach.places.insert(id, place(fd));
        }
        apply(&planned.changes, &reach, &mut effects).expect("apply");
        drop(reach);
        let mut states = self
            .states
            .iter_mut()
            .map(|(&id, state)| (id, state))
            .collect();
        planned.adopt(&mut states, &identities);
        crate::objects::socket_diag::close();
        if effects.reset_connections == 0 {
            for (&id, &fd) in &self.fds {
                // Identity is new where the socket is; the rest must be the same.
                let differences = self.states[&id]
                    .verify(&live(self.holder(), fd))
                    .expect("verify");
                assert_eq!(
                    differences,
                    Vec::<String>::new(),
                    "{}",
                    self.states[&id].describe()
                );
            }
        }
        (planned, effects)
    }
}

fn id(index: usize) -> ObjectId {
    ObjectId::from_raw(index as u64 + 1).expect("not zero")
}

/// The number it gets is given out only once, so that tests which run beside this one leave it alone once it is closed.
fn raw(fd: impl Into<OwnedFd>) -> RawFd {
    static NEXT: AtomicI32 = AtomicI32::new(500);
    let fd = fd.into();
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    nix::unistd::dup3(fd.as_raw_fd(), number, nix::fcntl::OFlag::O_CLOEXEC).expect("dup3")
}

fn close(fd: RawFd) {
    nix::unistd::close(fd).expect("close");
}

fn read(fd: RawFd, room: usize) -> Result<Vec<u8>, Errno> {
    let mut data = vec![0; room];
    let count = nix::sys::socket::recv(fd, &mut data, nix::sys::socket::MsgFlags::MSG_DONTWAIT)?;
    data.truncate(count);
    Ok(data)
}

fn write(fd: RawFd, data: &[u8]) {
    assert_eq!(nix::unistd::write(duplicate(fd), data), Ok(data.len()));
}

/// A duplicate, dropped after use.
fn duplicate(fd: RawFd) -> OwnedFd {
    let own = nix::unistd::Pid::this();
    let pidfd = crate::kernel::pidfd::open(own).expect("pidfd_open");
    crate::kernel::pidfd::get_fd(pidfd.as_fd(), fd).expect("pidfd_getfd")
}

#[test]
fn a_pair_that_was_closed_is_back_with_its_bytes() {
    let (one, two) = UnixStream::pair().expect("pair");
    let (one, two) = (raw(one), raw(two));
    write(one, b"hello");
    let mut recorded = Recorded::capture(&[one, two]);
    close(one);
    assert_eq!(read(two, 10), Ok(b"hello".to_vec()));
    let (planned, _) = recorded.roll_back(&[two]);
    assert_eq!(planned.make.len(), 1);
    assert_eq!(planned.replaced.len(), 2);
    assert_eq!(read(two, 10), Ok(b"hello".to_vec()));
    write(two, b"back");
    assert_eq!(read(one, 10), Ok(b"back".to_vec()));
    close(one);
    close(two);
}

#[test]
fn what_did_not_change_is_left_alone() {
    let (one, two) = UnixStream::pair().expect("pair");
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let client = TcpStream::connect(listener.local_addr().expect("name")).expect("connect");
    let (server, _) = listener.accept().expect("accept");
    let udp = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let fds = [
        raw(one),
        raw(two),
        raw(listener),
        raw(client),
        raw(server),
        raw(udp),
    ];
    write(fds[3], b"queued");
    let mut recorded = Recorded::capture(&fds);
    let (planned, effects) = recorded.roll_back(&fds);
    assert_eq!((planned, effects), (Plan::default(), Effects::default()));
    fds.into_iter().for_each(close);
}

#[test]
fn shutdown_of_a_pair_is_undone_with_a_new_pair() {
    let (one, two) = UnixStream::pair().expect("pair");
    let fds = [raw(one), raw(two)];
    let mut recorded = Recorded::capture(&fds);
    shutdown(duplicate(fds[0]).as_fd(), libc::SHUT_WR).expect("shutdown");
    recorded.roll_back(&fds);
    write(fds[0], b"again");
    assert_eq!(read(fds[1], 10), Ok(b"again".to_vec()));
    // And what was shut down at the checkpoint is so again.
    shutdown(duplicate(fds[0]).as_fd(), libc::SHUT_WR).expect("shutdown");
    let mut recorded = Recorded::capture(&fds);
    assert_eq!(read(fds[1], 10), Ok(vec![]));
    close(fds[1]);
    recorded.roll_back(&fds[..1]);
    assert_eq!(read(fds[1], 10), Ok(vec![]));
    assert_eq!(recorded.roll_back(&fds).0, Plan::default());
    write(fds[1], b"other way");
    assert_eq!(read(fds[0], 10), Ok(b"other way".to_vec()));
    fds.into_iter().for_each(close);
}

#[test]
fn datagrams_go_back_to_where_they_came_from() {
    let directory = tempfile::tempdir().expect("directory");
    let server = UnixDatagram::bind(directory.path().join("server")).expect("bind");
    let client = UnixDatagram::bind(directory.path().join("client")).expect("bind");
    let nameless = UnixDatagram::unbound().expect("unbound");
    for socket in [&client, &nameless] {
        socket
            .connect(directory.path().join("server"))
            .expect("connect");
    }
    client.send(b"from the client").expect("send");
    nameless.send(b"from nobody").expect("send");
    let fds = [raw(server), raw(client), raw(nameless)];
    let mut recorded = Recorded::capture(&fds);
    assert_eq!(read(fds[0], 100), Ok(b"from the client".to_vec()));
    write(fds[1], b"later");
    recorded.roll_back(&fds);
    close(fds[0]);
    std::fs::remove_file(directory.path().join("server")).expect("remove");
    let (planned, _) = recorded.roll_back(&fds[1..]);
    assert_eq!(planned.replaced, BTreeSet::from([id(0)]));
    assert_eq!(read(fds[0], 100), Ok(b"from the client".to_vec()));
    assert_eq!(read(fds[0], 100), Ok(b"from nobody".to_vec()));
    write(fds[2], b"connected again");
    assert_eq!(read(fds[0], 100), Ok(b"connected again".to_vec()));
    fds.into_iter().for_each(close);
}

#[test]
fn a_closed_unix_listener_and_its_connection_are_back() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("listener");
    let listener = UnixListener::bind(&path).expect("bind");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("chmod");
    let client = UnixStream::connect(&path).expect("connect");
    let (server, _) = listener.accept().expect("accept");
    let fds = [raw(listener), raw(client), raw(server)];
    write(fds[1], b"request");
    let mut recorded = Recorded::capture(&fds);
    fds.into_iter().for_each(close);
    let (planned, effects) = recorded.roll_back(&[]);
    assert_eq!(planned.replaced.len(), 3);
    assert_eq!(effects.reset_connections, 0);
    assert_eq!(read(fds[2], 100), Ok(b"request".to_vec()));
    let (planned, _) = recorded.roll_back(&fds);
    assert!(planned.make.is_empty());
    let mode = std::fs::symlink_metadata(&path).expect("file").mode();
    assert_eq!(mode & 0o777, 0o640);
    let mut later = UnixStream::connect(&path).expect("connect");
    later.write_all(b"x").expect("write");
    // Whoever came since is not in the backlog after the next one.
    let (planned, effects) = recorded.roll_back(&fds);
    assert_eq!((planned.make.len(), effects.reset_connections), (0, 1));
    assert_eq!(
        later.read(&mut [0; 1]).map_err(|error| error.kind()),
        Err(std::io::ErrorKind::ConnectionReset)
    );
    fds.into_iter().for_each(close);
}

#[test]
fn a_tcp_connection_inside_is_back_with_its_bytes_and_ports() {
    for (any, reach_it) in [
        ("127.0.0.1:0", "127.0.0.1"),
        ("[::]:0", "::1"),
        ("[::]:0", "127.0.0.1"),
    ] {
        let listener = TcpListener::bind(any).expect("bind");
        let port = listener.local_addr().expect("name").port();
        let client = TcpStream::connect((reach_it, port)).expect("connect");
        let (server, _) = listener.accept().expect("accept");
        let names = (client.local_addr().ok(), server.peer_addr().ok());
        client.set_nodelay(true).expect("option");
        let fds = [raw(listener), raw(client), raw(server)];
        write(fds[1], b"request");
        write(fds[2], b"answer");
        let mut recorded = Recorded::capture(&fds);
        // Read and written since: put back in place.
        assert_eq!(read(fds[2], 100), Ok(b"request".to_vec()));
        write(fds[2], b" more");
        let (planned, _) = recorded.roll_back(&fds);
        assert!(planned.make.is_empty());
        // One end closed since.
        close(fds[2]);
        recorded.roll_back(&fds[..2]);
        // All closed since.
        fds.into_iter().for_each(close);
        let (planned, effects) = recorded.roll_back(&[]);
        assert_eq!(planned.replaced.len(), 3);
        assert_eq!(effects.reset_connections, 0);
        assert_eq!(read(fds[2], 100), Ok(b"request".to_vec()));
        assert_eq!(read(fds[1], 100), Ok(b"answer".to_vec()));
        // A lot in both directions: the connection is a whole one.
        let client = TcpStream::from(duplicate(fds[1]));
        let server = TcpStream::from(duplicate(fds[2]));
        client.set_nonblocking(false).expect("blocking");
        server.set_nonblocking(false).expect("blocking");
        assert_eq!((client.local_addr().ok(), server.peer_addr().ok()), names);
        for (mut from, mut to) in [(&client, &server), (&server, &client)] {
            let data: Vec<u8> = (0..3_000_000u32).map(|i| (i >> 3) as u8).collect();
            std::thread::scope(|scope| {
                scope.spawn(|| from.write_all(&data).expect("write"));
                let mut got = vec![0; data.len()];
                to.read_exact(&mut got).expect("read");
                assert!(got == data);
            });
        }
        assert!(TcpStream::connect((reach_it, port)).is_ok());
        fds.into_iter().for_each(close);
    }
}

#[test]
fn bytes_that_fill_a_window_are_all_put_back() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let client = TcpStream::connect(listener.local_addr().expect("name")).expect("connect");
    let (server, _) = listener.accept().expect("accept");
    client.set_nonblocking(true).expect("option");
    let mut written = 0usize;
    let block: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    while let Ok(count) = (&client).write(&block[written % 100_000..]) {
        written += count;
    }
    let fds = [raw(client), raw(server)];
    let mut recorded = Recorded::capture(&fds);
    assert_eq!(recorded.states[&id(1)].queue[0].data.len(), written);
    assert_eq!(read(fds[1], 50_000).map(|data| data.len()), Ok(50_000));
    let (planned, _) = recorded.roll_back(&fds);
    assert!(planned.make.is_empty());
    assert!(recorded.observe(&fds)[&id(1)].queue == recorded.states[&id(1)].queue);
    fds.into_iter().for_each(close);
}

#[test]
fn connections_to_the_outside_are_kept_if_idle_and_else_reset() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("name");
    let connect = || {
        let inside = TcpStream::connect(address).expect("connect");
        (raw(inside), listener.accept().expect("accept").0)
    };
    let ((idle, mut idle_peer), (used, mut used_peer), (closed, mut closed_peer)) =
        (connect(), connect(), connect());
    let (queued, mut queued_peer) = connect();
    queued_peer.write_all(b"waits").expect("write");
    let fds = [idle, used, closed, queued];
    let mut recorded = Recorded::capture(&fds);
    idle_peer.write_all(b"ping").expect("write");
    assert_eq!(read(idle, 10), Ok(b"ping".to_vec()));
    used_peer.write_all(b"unread").expect("write");
    read(used, 2).expect("read");
    queued_peer.write_all(b" and more").expect("write");
    close(closed);
    let (planned, effects) = recorded.roll_back(&[idle, used, queued]);
    assert_eq!(effects.reset_connections, 2);
    assert_eq!(planned.replaced, BTreeSet::from([id(2)]));
    idle_peer.write_all(b"pong").expect("write");
    assert_eq!(read(idle, 10), Ok(b"pong".to_vec()));
    assert_eq!(read(queued, 100), Ok(b"waits and more".to_vec()));
    assert_eq!(read(used, 10), Err(Errno::ECONNABORTED));
    assert!(used_peer.read(&mut [0; 1]).is_err());
    assert_eq!(read(closed, 10), Err(Errno::ECONNRESET));
    assert_eq!(closed_peer.read(&mut [0; 1]).ok(), Some(0));
    // What was reset stays so and is not reset again; what was read since the checkpoint is.
    assert_eq!(recorded.roll_back(&fds).1.reset_connections, 1);
    assert_eq!(recorded.roll_back(&fds).1, Effects::default());
    fds.into_iter().for_each(close);
}

#[test]
fn a_listener_is_back_though_its_connections_live_on() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let zero = 0i32.to_ne_bytes();
    // std sets it; a server that does not has connections that do not share the port either.
    set_option(
        listener.as_fd(),
        libc::SOL_SOCKET,
        libc::SO_REUSEADDR,
        &zero,
    )
    .expect("option");
    let address = listener.local_addr().expect("name");
    let mut outside = TcpStream::connect(address).expect("connect");
    let (server, _) = listener.accept().expect("accept");
    let fds = [raw(listener), raw(server)];
    let mut recorded = Recorded::capture(&fds);
    close(fds[0]);
    recorded.roll_back(&fds[1..]);
    outside.write_all(b"still").expect("write");
    assert_eq!(read(fds[1], 10), Ok(b"still".to_vec()));
    let _late = TcpStream::connect(address).expect("connect");
    let mut value = [0; 4];
    option(
        duplicate(fds[0]).as_fd(),
        libc::SOL_SOCKET,
        libc::SO_REUSEADDR,
        &mut value,
    )
    .expect("option");
    assert_eq!(value, zero);
    let (_, effects) = recorded.roll_back(&fds);
    assert_eq!(effects.reset_connections, 1);
    fds.into_iter().for_each(close);
}

#[test]
fn udp_queues_and_addresses_go_back() {
    let one = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let two = UdpSocket::bind("0.0.0.0:0").expect("bind");
    let outside = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let port = two.local_addr().expect("name").port();
    one.connect(("127.0.0.1", port)).expect("connect");
    one.send(b"inside").expect("send");
    let fds = [raw(one), raw(two)];
    let mut recorded = Recorded::capture(&fds);
    outside
        .send_to(b"outside", ("127.0.0.1", port))
        .expect("send");
    assert_eq!(read(fds[1], 100), Ok(b"inside".to_vec()));
    let nobody = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let name = local_address(nobody.as_fd()).expect("name");
    connect(duplicate(fds[0]).as_fd(), &name).expect("connect");
    recorded.roll_back(&fds);
    close(fds[1]);
    close(fds[0]);
    let (planned, _) = recorded.roll_back(&[]);
    assert_eq!(planned.replaced.len(), 2);
    assert_eq!(read(fds[1], 100), Ok(b"inside".to_vec()));
    write(fds[0], b"connected");
    assert_eq!(read(fds[1], 100), Ok(b"connected".to_vec()));
    fds.into_iter().for_each(close);
}

#[test]
fn a_foreign_file_at_the_path_is_a_refusal() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("listener");
    let fds = [raw(UnixListener::bind(&path).expect("bind"))];
    let recorded = Recorded::capture(&fds);
    close(fds[0]);
    std::fs::remove_file(&path).expect("remove");
    let check = || {
        let states = borrow(&recorded.states);
        let planned = plan(&states, &BTreeMap::new()).expect("plan");
        let homes = Homes::from([(id(0), recorded.holder().pid)]);
        check_names(&planned, &states, &homes, &BTreeSet::new())
    };
    assert_eq!(check(), Ok(()));
    let foreign = UnixListener::bind(&path).expect("bind");
    assert!(check().is_err_and(|(_, why)| why.contains("outside the tree")));
    drop(foreign);
    assert_eq!(check(), Ok(()));
    std::fs::remove_file(&path).expect("remove");
    std::fs::write(&path, "text").expect("write");
    assert!(check().is_err_and(|(_, why)| why.contains("no socket")));
}

#[test]
fn a_filter_is_made_again() {
    let (one, two) = UnixStream::pair().expect("pair");
    // One instruction that accepts everything: struct sock_fprog of struct sock_filter { BPF_RET, .., 0xffff }.
    let program: [u64; 1] = [u64::from(libc::BPF_RET as u16) | 0xffff << 32];
    let mut argument = 1u64.to_ne_bytes().to_vec();
    argument.extend((program.as_ptr() as u64).to_ne_bytes());
    set_option(
        one.as_fd(),
        libc::SOL_SOCKET,
        libc::SO_ATTACH_FILTER,
        &argument,
    )
    .expect("filter");
    let fds = [raw(one), raw(two)];
    let mut recorded = Recorded::capture(&fds);
    assert_eq!(recorded.roll_back(&fds).0, Plan::default());
    close(fds[1]);
    let now = recorded.observe(&fds[..1]);
    let planned = plan(&borrow(&recorded.states), &borrow(&now)).expect("plan");
    assert!(planned.make.contains_key(&id(0)));
    assert!(planned.changes[&id(0)].steps.contains(&Step::Extra));
    close(fds[0]);
}
