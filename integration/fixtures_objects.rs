//! Fixture programs of descriptors other than sockets.

use crate::support::fixture_tests;

fixture_tests!(
    deleted_file,
    directory_stream,
    epoll,
    epoll_edge,
    epoll_missed_edge,
    eventfd,
    fd_closed_since,
    fd_inherited,
    fd_moved,
    fd_opened_since,
    fd_shared_table,
    fifo,
    file_locks,
    file_offset,
    inotify,
    inotify_removed,
    many_descriptors,
    memfd,
    pidfd,
    pipe_content,
    pipe_ended,
    plain_devices,
    signal_driven,
    signalfd,
    timerfd,
);
