use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;

use super::*;

/// A connection of this thread's loop, and its other side.
fn pair() -> (Stream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (Stream::new(ours.into()).unwrap(), theirs)
}

async fn read(stream: &Stream, bytes: usize) -> Vec<u8> {
    let mut into = vec![0; bytes];
    let read = std::future::poll_fn(|cx| stream.poll_read(cx, &mut into)).await.unwrap();
    into.truncate(read);
    into
}

#[test]
fn what_is_sent_is_read_in_pieces_of_any_size_and_then_the_end() {
    run(async {
        let (ours, mut theirs) = pair();
        for bytes in [1, 3, 64] {
            theirs.write_all(b"abc").unwrap();
            let mut got = Vec::new();
            while got.len() < 3 {
                got.extend(read(&ours, bytes).await);
            }
            assert_eq!(got, b"abc");
        }
        // The data and the end come as one event, and the read of the data is a short one.
        theirs.write_all(b"last").unwrap();
        drop(theirs);
        assert_eq!(read(&ours, 64).await, b"last");
        assert_eq!(read(&ours, 64).await, b"");
        assert!(ours.is_hung_up());
    })
    .unwrap();
}

#[test]
fn what_is_read_ahead_is_all_there_and_then_the_end() {
    run(async {
        for (bytes, room) in [(5, 64), (5, 2), (buffers::BUFFER_BYTES, 3_000), (3 * buffers::BUFFER_BYTES + 1, 40_000)] {
            let (ours, mut theirs) = pair();
            let all: Vec<u8> = (0..bytes).map(|n| n as u8).collect();
            let sent = all.clone();
            let reading = spawn(async move {
                let mut got = Vec::new();
                loop {
                    let read = std::future::poll_fn(|cx| {
                        let mut into = vec![0; room];
                        if ours.poll_readable(cx).is_pending() {
                            ours.let_read_ahead();
                            return Poll::Pending;
                        }
                        ours.poll_read(cx, &mut into).map_ok(|read| into[..read].to_vec())
                    });
                    match read.await.unwrap() {
                        read if read.is_empty() => return got,
                        read => got.extend(read),
                    }
                }
            });
            yield_now().await;
            let writing = std::thread::spawn(move || theirs.write_all(&sent).unwrap());
            assert_eq!(reading.await, all);
            writing.join().unwrap();
        }
    })
    .unwrap();
}

#[test]
fn who_waits_hears_of_a_reset_once_also_if_that_was_read_ahead() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = Stream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (theirs, _) = listener.accept().unwrap();
        let reading = spawn(async move {
            std::future::poll_fn(|cx| {
                if ours.poll_readable(cx).is_pending() {
                    ours.let_read_ahead();
                    return Poll::Pending;
                }
                ours.poll_read(cx, &mut [0; 8])
            })
            .await
        });
        yield_now().await;
        rustix::net::sockopt::set_socket_linger(&theirs, Some(Duration::ZERO)).unwrap();
        drop(theirs);
        assert_eq!(reading.await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    })
    .unwrap();
}

#[test]
fn a_task_that_waits_is_woken_by_data_by_room_and_by_the_other_sides_end() {
    run(async {
        let (ours, mut theirs) = pair();
        let reading = spawn(async move { (read(&ours, 8).await, ours) });
        yield_now().await;
        theirs.write_all(b"hello").unwrap();
        let (got, ours) = reading.await;
        assert_eq!(got, b"hello");

        let full = vec![b'x'; 1 << 20];
        let mut left = &full[..];
        let filled = std::future::poll_fn(|cx| {
            while let Poll::Ready(written) = ours.poll_write(cx, left) {
                left = &left[written.unwrap()..];
                if left.is_empty() {
                    return Poll::Ready(true);
                }
            }
            Poll::Ready(false)
        });
        assert!(!filled.await, "a socket does not hold a megabyte");
        let rest = left.to_vec();
        let draining = std::thread::spawn(move || {
            let mut all = vec![0; 1 << 20];
            theirs.read_exact(&mut all).unwrap();
            theirs
        });
        let mut rest = &rest[..];
        while !rest.is_empty() {
            let written = std::future::poll_fn(|cx| ours.poll_write(cx, rest)).await.unwrap();
            rest = &rest[written..];
        }
        let theirs = draining.join().unwrap();
        drop(theirs);
        std::future::poll_fn(|cx| ours.poll_hung_up(cx)).await;
    })
    .unwrap();
}

#[test]
fn a_connection_is_made_or_refused() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stream = Stream::connect(address).await.unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        accepted.write_all(b"hi").unwrap();
        assert_eq!(read(&stream, 9).await, b"hi");
        drop((listener, accepted));
        let refused = Stream::connect(address).await.err().unwrap();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    })
    .unwrap();
}

#[test]
fn a_deadline_moves_on_and_back() {
    run(async {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut deadline = Deadline::new();
        for later in [10, 60_000, 50_000] {
            assert!(std::future::poll_fn(|cx| Poll::Ready(deadline.poll_past(cx, at(later)))).await.is_pending());
        }
        deadline.past(at(30)).await;
        assert!(Instant::now() >= at(30));
        deadline.past(at(40)).await;
        assert!(Instant::now() >= at(40) && Instant::now() < at(30_000));
    })
    .unwrap();
}

#[test]
fn a_task_can_be_woken_from_another_thread_and_is_run_on_its_own() {
    let event_loop = EventLoop::start("test", |run| run()).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let (release, released) = futures::channel::oneshot::channel();
    event_loop.handle().send(move || {
        let home = std::thread::current().id();
        spawn(async move {
            let value: u32 = released.await.unwrap();
            tell.send((value, std::thread::current().id() == home)).unwrap();
        })
        .detach();
    });
    std::thread::spawn(move || release.send(7).unwrap()).join().unwrap();
    assert_eq!(told.recv(), Ok((7, true)));
}

#[test]
fn a_loop_that_is_dropped_ends_with_its_tasks() {
    let (held, gone) = std::sync::mpsc::channel::<()>();
    let event_loop = EventLoop::start("test", |run| run()).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    event_loop.handle().send(move || {
        spawn(async move {
            let _held = held;
            let (ours, _theirs) = pair();
            tell.send(()).unwrap();
            read(&ours, 8).await;
        })
        .detach();
    });
    told.recv().unwrap();
    drop(event_loop);
    assert!(gone.recv().is_err());
}

#[test]
fn busy_tasks_do_not_keep_the_sockets_from_being_read() {
    run(async {
        let (ours, mut theirs) = pair();
        let busy: Vec<_> = (0..3)
            .map(|_| {
                spawn(async {
                    loop {
                        yield_now().await;
                    }
                })
            })
            .collect();
        std::thread::spawn(move || theirs.write_all(b"hello").unwrap());
        assert_eq!(read(&ours, 8).await, b"hello");
        drop(busy);
    })
    .unwrap();
}

#[test]
fn a_loop_that_has_ended_drops_what_it_is_sent() {
    let event_loop = EventLoop::start("test", |run| run()).unwrap();
    let handle = event_loop.handle().clone();
    assert!(!handle.has_ended());
    let (held, gone) = std::sync::mpsc::channel::<()>();
    let waiting = held.clone();
    handle.send(move || {
        // What was sent before the end, and comes after it.
        expect_current().shared.push(Incoming::Job(Box::new(move || drop(waiting))));
        panic!("as a task might")
    });
    while !handle.has_ended() {
        std::thread::yield_now();
    }
    handle.send(move || held.send(()).unwrap());
    assert!(gone.recv().is_err(), "nobody has it any more, and nobody did it");
}
