//! A TCP connection made of two new sockets with the addresses of old ones, by `TCP_REPAIR` (Linux 3.5).

use std::os::fd::BorrowedFd;

use crate::kernel::socket::{Address, bind, connect, set_option};

/// Queues of `TCP_REPAIR_QUEUE` in `linux/tcp.h`.
const TCP_NO_QUEUE: u32 = 0;
const TCP_RECV_QUEUE: u32 = 1;
const TCP_SEND_QUEUE: u32 = 2;
/// Leaves repair mode without a window probe.
const TCP_REPAIR_OFF_NO_WP: i32 = -1;

/// `struct tcp_repair_opt` kinds of `linux/tcp.h`, which are those of the protocol.
const TCPOPT_MSS: u32 = 2;
const TCPOPT_WINDOW: u32 = 3;
const TCPOPT_SACK_PERMITTED: u32 = 4;
/// Of the loopback interface: its MTU without the headers of IPv6.
const LOOPBACK_MSS: u32 = 65_476;
const WINDOW_SCALE: u32 = 7;
const FIRST_WINDOW: u32 = 65_535;

/// Connects two new sockets to each other, each bound to its address, without sending anything: both are told where in
/// the stream the other is.
pub(super) fn join(
    one: BorrowedFd<'_>,
    one_local: &Address,
    one_peer: &Address,
    two: BorrowedFd<'_>,
    two_local: &Address,
    two_peer: &Address,
) -> nix::Result<()> {
    const SEQUENCES: [u32; 2] = [0x1000_0000, 0x2000_0000];
    let ends = [(one, one_local, one_peer), (two, two_local, two_peer)];
    for (index, (fd, local, _)) in ends.into_iter().enumerate() {
        let number =
            |name: i32, value: u32| set_option(fd, libc::IPPROTO_TCP, name, &value.to_ne_bytes());
        number(libc::TCP_REPAIR, 1)?;
        number(libc::TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)?;
        number(libc::TCP_QUEUE_SEQ, SEQUENCES[index])?;
        number(libc::TCP_REPAIR_QUEUE, TCP_RECV_QUEUE)?;
        number(libc::TCP_QUEUE_SEQ, SEQUENCES[1 - index])?;
        number(libc::TCP_REPAIR_QUEUE, TCP_NO_QUEUE)?;
        bind(fd, local)?;
    }
    for (index, (fd, _, peer)) in ends.into_iter().enumerate() {
        let words = |words: &[u32]| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_ne_bytes()).collect()
        };
        connect(fd, peer)?;
        let options = words(&[
            TCPOPT_MSS,
            LOOPBACK_MSS,
            TCPOPT_WINDOW,
            WINDOW_SCALE | WINDOW_SCALE << 16,
            TCPOPT_SACK_PERMITTED,
            0,
        ]);
        set_option(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR_OPTIONS, &options)?;
        // struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
        let their_sequence = SEQUENCES[1 - index];
        let window = words(&[
            their_sequence,
            FIRST_WINDOW,
            FIRST_WINDOW,
            FIRST_WINDOW,
            their_sequence,
        ]);
        set_option(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR_WINDOW, &window)?;
    }
    for (fd, ..) in ends {
        set_option(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            &TCP_REPAIR_OFF_NO_WP.to_ne_bytes(),
        )?;
    }
    Ok(())
}
