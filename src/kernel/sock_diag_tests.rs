use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};

use super::*;
use crate::kernel::socket::{self, SO_COOKIE};

fn cookie(fd: impl AsFd) -> u64 {
    socket::u64_option(fd.as_fd(), libc::SOL_SOCKET, SO_COOKIE).expect("cookie")
}

#[test]
fn unix_pairs_know_each_other_and_their_queues() {
    let (mut one, other) = UnixStream::pair().expect("pair");
    one.write_all(b"12345").expect("write");
    let all = SockDiag::open().expect("open").unix().expect("dump");
    let one_found = all
        .iter()
        .find(|s| s.cookie == cookie(&one))
        .expect("one end");
    let other_found = all
        .iter()
        .find(|s| s.cookie == cookie(&other))
        .expect("other end");
    assert_eq!(one_found.peer, Some(other_found.inode));
    assert_eq!(other_found.receive_queue, 5);
    assert_eq!(one_found.state, state::ESTABLISHED);
}

#[test]
fn unix_listeners_show_name_file_and_waiting_connections() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).expect("bind");
    let client = UnixStream::connect(&path).expect("connect");
    let all = SockDiag::open().expect("open").unix().expect("dump");
    let found = all
        .iter()
        .find(|s| s.cookie == cookie(&listener))
        .expect("listener");
    let waiting = all
        .iter()
        .find(|s| s.cookie == cookie(&client))
        .expect("client");
    assert_eq!((found.state, found.receive_queue), (state::LISTEN, 1));
    assert_eq!(found.pending, [waiting.inode]);
    assert!(found.file.is_some());
    assert!(
        found
            .name
            .as_ref()
            .is_some_and(|name| name.ends_with(b"/socket"))
    );
}

#[test]
fn an_aborted_connection_fails_at_both_ends() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let mut client = TcpStream::connect(listener.local_addr().expect("name")).expect("connect");
    let (mut server, _) = listener.accept().expect("accept");
    let mut diag = SockDiag::open().expect("open");
    let all = diag.inet(libc::AF_INET, libc::IPPROTO_TCP).expect("dump");
    let found = all
        .iter()
        .find(|s| s.cookie == cookie(&client))
        .expect("client");
    assert_eq!(found.state, state::ESTABLISHED);
    assert_eq!(Some(found.remote), client.peer_addr().ok());
    diag.destroy(found).expect("destroy");
    let mut byte = [0];
    assert_eq!(
        client.read(&mut byte).map_err(|e| e.kind()),
        Err(std::io::ErrorKind::ConnectionAborted)
    );
    assert_eq!(
        server.read(&mut byte).map_err(|e| e.kind()),
        Err(std::io::ErrorKind::ConnectionReset)
    );
}

#[test]
fn udp_sockets_are_found_in_both_families() {
    let mut diag = SockDiag::open().expect("open");
    for (family, any) in [(libc::AF_INET, "127.0.0.1:0"), (libc::AF_INET6, "[::1]:0")] {
        let bound = UdpSocket::bind(any).expect("bind");
        let all = diag.inet(family, libc::IPPROTO_UDP).expect("dump");
        let found = all
            .iter()
            .find(|s| s.cookie == cookie(&bound))
            .expect("socket");
        assert_eq!(Some(found.local), bound.local_addr().ok());
    }
}

#[test]
fn cut_messages_are_no_panic() {
    let message = [0u8; 100];
    for length in 0..message.len() {
        let _ = parse_unix(&message[..length]);
        let _ = parse_inet(&message[..length], 6);
    }
}
