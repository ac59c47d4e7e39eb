//! Filters of sockets: classic BPF programs (socket(7), `SO_ATTACH_FILTER`), whose code the kernel gives back.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

const SO_GET_FILTER: i32 = libc::SO_ATTACH_FILTER;

/// The program of a socket, an instruction (`struct sock_filter`) each; empty if it has none.
///
/// # Errors
/// `EACCES` for an eBPF program, which can't be read.
pub fn read(fd: BorrowedFd<'_>) -> nix::Result<Vec<u64>> {
    let mut program: Vec<u64> = Vec::new();
    loop {
        // Unlike with any other option this is no number of bytes.
        let mut instructions = program.len() as libc::socklen_t;
        // SAFETY: the kernel writes at most that many instructions of 8 bytes, for which `program` has room.
        let result = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_GET_FILTER,
                program.as_mut_ptr().cast(),
                &raw mut instructions,
            )
        };
        match Errno::result(result) {
            Ok(_) if instructions as usize == program.len() => return Ok(program),
            // With no room it only tells how many there are; with too little it refuses.
            Ok(_) => program.resize(instructions as usize, 0),
            Err(Errno::EINVAL) if !program.is_empty() => program.clear(),
            Err(errno) => return Err(errno),
        }
    }
}

/// Gives a socket this program in place of any other.
pub fn attach(fd: BorrowedFd<'_>, program: &[u64]) -> nix::Result<()> {
    let fprog = libc::sock_fprog {
        len: program.len() as libc::c_ushort,
        // The kernel only reads it.
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel reads `fprog` and the instructions it points to, which outlive the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const fprog).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_program_is_read_back() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(read(socket.as_fd()), Ok(vec![]));
        // Twice BPF_RET | BPF_K, with 100 and 200 bytes.
        let program = [0x0000_0064_0000_0006, 0x0000_00c8_0000_0006];
        attach(socket.as_fd(), &program).unwrap();
        assert_eq!(read(socket.as_fd()), Ok(program.to_vec()));
    }
}
