//! Fixture programs of sockets: queues, listeners, connections inside and to the outside, options.

crate::support::fixture_tests! {
    socket_options,
    tcp_closed,
    tcp_inside,
    tcp_listener,
    tcp_outside,
    udp,
    unix_closed,
    unix_dgram,
    unix_listener,
    unix_seqpacket,
    unix_stream_queue,
}
