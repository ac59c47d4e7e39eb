//! Fixture programs of sockets: queues, listeners, connections inside and to the outside, options.

use std::process::Command;

use crate::support::fixture::{Fixture, build_directory};
use crate::support::session::{Answer, REFUSED, Session};

crate::support::fixture_tests! {
    ended_connections,
    icmp_socket,
    multicast,
    netlink,
    orphan_datagrams,
    socket_buffers,
    socket_filter,
    socket_options,
    tcp_closed,
    tcp_connecting,
    tcp_flooded,
    tcp_inside,
    tcp_listener,
    tcp_listener_later,
    tcp_reading_ended,
    tcp_urgent,
    udp,
    udp_corked,
    unix_autobind,
    unix_bound_deleted,
    unix_closed,
    unix_dgram,
    unix_listener,
    unix_listener_inherited,
    unix_rights,
    unix_seqpacket,
    unix_shared,
    unix_stream_queue,
}

/// Its connection is reset by the first rollback, and it looks at that no more: no other checkpoint can be taken then.
mod tcp_outside {
    #[test]
    fn notices_what_is_wrecked() {
        crate::support::fixture::control_run("tcp_outside");
    }

    #[test]
    fn comes_back() {
        crate::support::fixture::rollback_run("tcp_outside");
    }
}

/// What names the socket in a refusal.
fn refused(answer: &Answer) -> String {
    let refused = &answer.report["refused"];
    format!("{}: {}", refused["object"], refused["remedy"])
}

/// The program that has such a socket.
fn start(which: &str) -> Fixture {
    let mut command = Command::new(build_directory().join("socket_refused"));
    command.env("SOCKET", which);
    Fixture::launch("socket_refused", command)
}

/// In a network namespace of its own, where the keeper is not.
#[test]
fn sockets_of_another_network_namespace_come_back() {
    for program in [
        "tcp_closed",
        "tcp_listener",
        "udp",
        "unix_closed",
        "unix_listener",
    ] {
        let mut command = Command::new("unshare");
        let script = format!(
            "ip link set lo up && exec {}",
            build_directory().join(program).display()
        );
        command.args(["--net", "sh", "-c", &script]);
        let mut session = Session::new();
        let mut fixture = Fixture::launch(program, command);
        session.checkpoint(fixture.pid());
        for _ in 0..2 {
            fixture.mutate();
            session.rollback(fixture.pid());
            fixture.verify("after a rollback");
            fixture.run_on();
        }
    }
}

#[test]
fn what_cannot_be_recorded_is_refused_by_name() {
    for (which, name) in [("packet", "packet socket"), ("vsock", "vsock socket")] {
        let mut session = Session::new();
        let mut fixture = start(which);
        let answer = session.try_checkpoint(fixture.pid()).expect(REFUSED, which);
        assert!(refused(&answer).contains(name), "{which}: {answer:#?}");
        fixture.verify("after it was refused");
    }
}

#[test]
fn what_cannot_be_brought_back_is_refused_before_anything_is_touched() {
    for (which, name) in [
        ("rights", "SCM_RIGHTS"),
        ("waiting", "accepted since"),
        ("credentials", "SO_PASSCRED"),
        ("nameless", "without a name"),
    ] {
        let mut session = Session::new();
        let mut fixture = start(which);
        session.checkpoint(fixture.pid());
        session.rollback(fixture.pid());
        fixture.verify("after a rollback with nothing to do");
        fixture.mutate();
        let answer = session.try_rollback(fixture.pid()).expect(REFUSED, which);
        assert!(refused(&answer).contains(name), "{which}: {answer:#?}");
        assert!(
            fixture.ask(b'v').starts_with("FAIL "),
            "{which} was touched"
        );
    }
}
