use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixStream};

use super::*;

#[test]
fn messages_come_with_source_and_boundaries() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("sender");
    let sender = UnixDatagram::bind(&path).expect("bind");
    let (one, other) = UnixDatagram::pair().expect("pair");
    let receiver = UnixDatagram::bind(directory.path().join("receiver")).expect("bind");
    let to = local_address(receiver.as_fd()).expect("name");
    for text in [&b"first"[..], b"", b"third"] {
        assert_eq!(send(sender.as_fd(), text, &to, None, &[]), Ok(text.len()));
        let got = receive(receiver.as_fd(), 100, 0)
            .expect("receive")
            .expect("message");
        assert_eq!(got.data, text);
        assert_eq!(
            got.source.unix_path(),
            Some(path.as_os_str().as_encoded_bytes())
        );
        assert!(got.rights.is_empty() && !got.truncated);
    }
    assert_eq!(receive(receiver.as_fd(), 100, 0), Ok(None));
    assert_eq!(
        send(one.as_fd(), b"longer", &Address::default(), None, &[]),
        Ok(6)
    );
    let cut = receive(other.as_fd(), 3, libc::MSG_PEEK)
        .expect("receive")
        .expect("message");
    assert!(cut.truncated);
}

#[test]
fn descriptors_and_credentials_are_seen() {
    let (one, other) = UnixStream::pair().expect("pair");
    send(
        one.as_fd(),
        b"x",
        &Address::default(),
        None,
        &[one.as_fd(), other.as_fd()],
    )
    .expect("send");
    let got = receive(other.as_fd(), 10, 0)
        .expect("receive")
        .expect("message");
    assert!(got.rights.len() == 2 && got.credentials.is_none());
    set_option(
        other.as_fd(),
        libc::SOL_SOCKET,
        libc::SO_PASSCRED,
        &1i32.to_ne_bytes(),
    )
    .expect("option");
    let me = Credentials {
        pid: std::process::id() as i32,
        uid: 0,
        gid: 0,
    };
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIP sending for another user needs root");
        return;
    }
    let sender = Credentials { uid: 12, ..me };
    send(one.as_fd(), b"y", &Address::default(), Some(sender), &[]).expect("send");
    let got = receive(other.as_fd(), 10, 0)
        .expect("receive")
        .expect("message");
    assert_eq!(got.credentials, Some(sender));
    assert!(got.rights.is_empty());
}

#[test]
fn addresses_are_understood() {
    let listener = TcpListener::bind("[::1]:0").expect("bind");
    let address = local_address(listener.as_fd()).expect("name");
    assert_eq!(address.inet(), listener.local_addr().ok());
    assert_eq!(peer_address(listener.as_fd()), Ok(None));
    let client = TcpStream::connect(listener.local_addr().expect("name")).expect("connect");
    assert_eq!(peer_address(client.as_fd()).expect("name"), Some(address));
    let named = Address::unix(b"\0abstract");
    assert_eq!(named.unix_name(), Some(&b"\0abstract"[..]));
    assert_eq!(named.unix_path(), None);
    assert_eq!(Address::unix(b"/a/b").unix_path(), Some(&b"/a/b"[..]));
    assert_eq!(Address::default().unix_name(), None);
}

#[test]
fn nothing_to_accept_is_none_also_of_a_blocking_listener() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    assert!(accept(listener.as_fd()).expect("accept").is_none());
    let _client = TcpStream::connect(listener.local_addr().expect("name")).expect("connect");
    assert!(accept(listener.as_fd()).expect("accept").is_some());
}

#[test]
fn a_thread_enters_a_network_namespace_and_nobody_else_does() {
    let own = std::fs::File::open("/proc/self/ns/net").expect("namespace");
    let seen = in_network_namespace(own.as_fd(), || {
        std::fs::read_link("/proc/thread-self/ns/net").ok()
    });
    match seen {
        Ok(seen) => assert_eq!(seen, std::fs::read_link("/proc/self/ns/net").ok()),
        Err(Errno::EPERM) => eprintln!("SKIP setns needs CAP_SYS_ADMIN"),
        Err(error) => panic!("{error}"),
    }
}
