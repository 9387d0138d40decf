use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc;
use std::thread;

use futures::FutureExt as _;
use futures::executor::block_on;

use super::*;
use crate::gateway::endpoints::health::{EJECT_MS, EJECT_MS_MAX};

const NOW: Time = Time(1_000_000);
/// Longer than any test: nobody is late by accident.
const PATIENCE_MS: u64 = 600_000;

fn limits() -> Limits {
    Limits { in_flight_max: 1_024, queue_max: 8, queue_ms_max: PATIENCE_MS, failures_max: 3 }
}

fn endpoints(count: usize, limits: Limits) -> Arc<Endpoints> {
    let address = |n| Address::parse(&format!("http://127.0.0.1:{}", 9_000 + n)).unwrap();
    Endpoints::new((0..count).map(address).collect(), limits)
}

fn outstanding(endpoints: &Endpoints) -> Vec<usize> {
    endpoints.all().iter().map(|endpoint| endpoint.outstanding.load(SeqCst)).collect()
}

/// Draws these numbers, one after the other.
fn drawing(numbers: &[usize]) -> impl FnMut(usize) -> usize {
    let mut numbers = numbers.iter().copied();
    move |below| {
        let drawn = numbers.next().expect("no more draws");
        assert!(drawn < below, "{drawn} of {below}");
        drawn
    }
}

/// This endpoint's permits are what the test wants: all others are avoided by force.
fn permit_of(endpoints: &Arc<Endpoints>, index: usize) -> Permit {
    let endpoint = &endpoints.all()[index];
    assert!(endpoint.take(usize::MAX));
    endpoints.permit(index, endpoint)
}

fn totals(endpoints: &Endpoints) -> Vec<EndpointTotals> {
    endpoints.totals(&ModelId::new("m").unwrap()).servers
}

fn waiting(endpoints: &Endpoints) -> usize {
    endpoints.queue.length()
}

fn eject(endpoints: &Arc<Endpoints>, index: usize, now: Time) {
    for _ in 0..endpoints.limits.failures_max {
        permit_of(endpoints, index).failed(now);
    }
    assert!(totals(endpoints)[index].ejected);
}

type Admission<'e> = Pin<Box<dyn Future<Output = Result<Permit, Overloaded>> + Send + 'e>>;

/// Joins the queue: there is no place at once.
fn queue(endpoints: &Arc<Endpoints>) -> Admission<'_> {
    let mut admission: Admission<'_> = endpoints.admit(|| NOW).boxed();
    assert!((&mut admission).now_or_never().is_none());
    admission
}

#[test]
fn of_two_that_are_drawn_the_less_loaded_one_is_taken() {
    let endpoints = endpoints(4, limits());
    let _held: Vec<_> = [0, 0, 0, 1, 2, 2].map(|index| permit_of(&endpoints, index)).into();
    // The second number counts among the others only.
    for (draws, index) in [([0, 0], 1), ([0, 1], 2), ([1, 0], 1), ([2, 1], 1), ([3, 0], 3), ([0, 2], 3), ([2, 0], 2)] {
        let permit = endpoints.find(NOW, None, &mut drawing(&draws)).unwrap();
        assert_eq!(permit.index(), index, "{draws:?}");
        assert_eq!(permit.address(), endpoints.all()[index].address());
    }
    assert_eq!(outstanding(&endpoints), [3, 1, 2, 0]);
}

#[test]
fn load_is_shared_evenly_where_all_are_as_fast() {
    let endpoints = endpoints(8, limits());
    let held: Vec<_> = (0..800).map(|_| endpoints.try_admit(NOW, None).unwrap()).collect();
    // By chance alone, one of eight would be off by more than ten from its hundred.
    for outstanding in outstanding(&endpoints) {
        assert!((90..=110).contains(&outstanding), "{outstanding}");
    }
    drop(held);
    assert_eq!(outstanding(&endpoints), [0; 8]);
    assert_eq!(totals(&endpoints).iter().map(|totals| totals.requests).sum::<u64>(), 800);
}

#[test]
fn no_endpoint_gets_more_than_its_limit_and_every_place_is_found() {
    for count in [1, 2, 5, ENDPOINTS_MAX] {
        let endpoints = endpoints(count, Limits { in_flight_max: 3, ..limits() });
        let mut held: Vec<_> = (0..3 * count).map(|_| endpoints.try_admit(NOW, None).unwrap()).collect();
        assert_eq!(outstanding(&endpoints), vec![3; count]);
        assert!(endpoints.try_admit(NOW, None).is_none());
        let freed = held.swap_remove(count).index();
        assert_eq!(endpoints.try_admit(NOW, None).unwrap().index(), freed);
    }
}

#[test]
fn more_addresses_than_the_limit_are_not_used() {
    assert_eq!(endpoints(ENDPOINTS_MAX + 1, limits()).all().len(), ENDPOINTS_MAX);
    assert!(endpoints(0, limits()).try_admit(NOW, None).is_none());
}

#[test]
fn an_ejected_endpoint_gets_nothing_then_one_request_then_its_share() {
    let endpoints = endpoints(2, limits());
    eject(&endpoints, 0, NOW);
    let before: Vec<_> = (0..20).map(|_| endpoints.try_admit(NOW, None).unwrap().index()).collect();
    assert_eq!(before, [1; 20]);
    let back = NOW.plus_ms(EJECT_MS);
    // Loaded, so that the one on trial is the better choice each time.
    let _load: Vec<_> = (0..9).map(|_| permit_of(&endpoints, 1)).collect();
    let trial = endpoints.try_admit(back, None).unwrap();
    assert_eq!(trial.index(), 0);
    for _ in 0..20 {
        assert_eq!(endpoints.try_admit(back, None).unwrap().index(), 1, "one at a time");
    }
    trial.failed(back);
    drop(trial);
    assert_eq!(endpoints.try_admit(back.plus_ms(2 * EJECT_MS - 1), None).unwrap().index(), 1, "twice as long");
    let back = back.plus_ms(2 * EJECT_MS);
    let trial = endpoints.try_admit(back, None).unwrap();
    assert_eq!(trial.index(), 0);
    assert!(totals(&endpoints)[0].ejected);
    trial.answered();
    assert!(!totals(&endpoints)[0].ejected);
    let shared: Vec<_> = (0..5).map(|_| endpoints.try_admit(back, None).unwrap()).collect();
    assert!(shared.iter().all(|permit| permit.index() == 0), "{shared:?}");
    assert_eq!(totals(&endpoints)[0].failures, 4);
}

#[test]
fn where_all_are_ejected_all_are_tried_and_who_answers_is_back_at_once() {
    let endpoints = endpoints(3, limits());
    (0..3).for_each(|index| eject(&endpoints, index, NOW));
    let held: Vec<_> = (0..300).map(|_| endpoints.try_admit(NOW, None).unwrap()).collect();
    assert!(outstanding(&endpoints).iter().all(|n| (90..=110).contains(n)), "{:?}", outstanding(&endpoints));
    held.iter().find(|permit| permit.index() == 1).unwrap().answered();
    let after: Vec<_> = (0..20).map(|_| endpoints.try_admit(NOW, None).unwrap().index()).collect();
    assert_eq!(after, [1; 20]);
}

#[test]
fn a_single_endpoint_is_tried_whatever_happened_to_it() {
    let endpoints = endpoints(1, limits());
    eject(&endpoints, 0, NOW);
    assert!(endpoints.probed(0, false, NOW) || endpoints.probed(0, false, NOW) || endpoints.probed(0, false, NOW));
    let _held: Vec<_> = (0..50).map(|_| endpoints.try_admit(NOW, Some(0)).unwrap()).collect();
}

#[test]
fn a_retry_goes_elsewhere_if_there_is_elsewhere() {
    let endpoints = endpoints(3, Limits { in_flight_max: 1, ..limits() });
    eject(&endpoints, 2, NOW);
    for _ in 0..20 {
        assert_eq!(endpoints.try_admit(NOW, Some(0)).unwrap().index(), 1);
    }
    let taken = permit_of(&endpoints, 1);
    assert!(endpoints.try_admit(NOW, Some(0)).is_none(), "the healthy one is full");
    drop(taken);
    // The other two have been ejected: rather one of them than the one that has just failed.
    eject(&endpoints, 1, NOW);
    for _ in 0..20 {
        assert_ne!(endpoints.try_admit(NOW, Some(0)).unwrap().index(), 0);
    }
}

#[test]
fn an_endpoint_that_its_probes_find_down_is_left_out_until_they_find_it_up() {
    let endpoints = endpoints(2, limits());
    let probe = |well| endpoints.probed(1, well, NOW);
    assert!(!probe(false) && !probe(false) && probe(false));
    for _ in 0..20 {
        assert_eq!(endpoints.try_admit(NOW.plus_ms(10 * EJECT_MS_MAX), None).unwrap().index(), 0);
    }
    assert!(totals(&endpoints)[1].ejected);
    assert!(probe(true));
    let _held = [endpoints.try_admit(NOW, None).unwrap(), endpoints.try_admit(NOW, None).unwrap()];
    assert_eq!(outstanding(&endpoints), [1, 1]);
    assert!(!endpoints.probed(2, false, NOW), "there is no such endpoint");
}

#[test]
fn those_that_wait_are_served_in_their_order_and_nobody_passes_them() {
    let endpoints = endpoints(2, Limits { in_flight_max: 1, ..limits() });
    let mut held = [endpoints.try_admit(NOW, None).unwrap(), endpoints.try_admit(NOW, None).unwrap()].map(Some);
    let (mut first, mut second, mut third) = (queue(&endpoints), queue(&endpoints), queue(&endpoints));
    assert_eq!(waiting(&endpoints), 3);
    let freed = held[1].take().unwrap();
    let index = freed.index();
    drop(freed);
    assert!(endpoints.try_admit(NOW, None).is_none(), "the place is the first one's already");
    assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());
    let served = (&mut first).now_or_never().unwrap().unwrap();
    assert_eq!(served.index(), index);
    drop(first);
    assert_eq!(waiting(&endpoints), 2);
    drop(served);
    drop(held);
    let (second, third) = (second.now_or_never().unwrap().unwrap(), third.now_or_never().unwrap().unwrap());
    assert_ne!(second.index(), third.index());
    drop((second, third));
    assert_eq!((outstanding(&endpoints), waiting(&endpoints)), (vec![0, 0], 0));
}

#[test]
fn a_full_queue_refuses_at_once_and_says_when_to_come_again() {
    let full = endpoints(1, Limits { in_flight_max: 1, queue_max: 2, queue_ms_max: 1_500, ..limits() });
    let _held = full.try_admit(NOW, None).unwrap();
    let _waiting = [queue(&full), queue(&full)];
    let refused = full.admit(|| NOW).now_or_never().unwrap().unwrap_err();
    assert_eq!(refused, Overloaded::Full { places: 1, queue_max: 2, queue_ms_max: 1_500 });
    assert_eq!(refused.to_string(), "all 1 requests that may be in flight are, and 2 wait already");
    assert_eq!((refused.retry_after_s(), full.refused.load(SeqCst)), (2, 1));
    let none = endpoints(1, Limits { in_flight_max: 1, queue_max: 0, ..limits() });
    let _held = none.try_admit(NOW, None).unwrap();
    assert!(none.admit(|| NOW).now_or_never().unwrap().is_err(), "a queue of none");
}

#[test]
fn who_waits_too_long_is_refused_and_leaves_the_queue() {
    let endpoints = endpoints(1, Limits { in_flight_max: 1, queue_ms_max: 20, ..limits() });
    let held = endpoints.try_admit(NOW, None).unwrap();
    let late = block_on(endpoints.admit(|| NOW)).unwrap_err();
    assert_eq!((late, late.retry_after_s()), (Overloaded::Late { places: 1, queue_ms_max: 20 }, 1));
    assert_eq!(late.to_string(), "all 1 requests that may be in flight are, and no place became free within 20 ms");
    assert_eq!(waiting(&endpoints), 0);
    drop(held);
    assert!(block_on(endpoints.admit(|| NOW)).is_ok());
}

#[test]
fn who_goes_away_while_waiting_holds_up_nobody() {
    let endpoints = endpoints(1, Limits { in_flight_max: 1, ..limits() });
    let held = endpoints.try_admit(NOW, None).unwrap();
    let (gone, served_and_gone, last) = (queue(&endpoints), queue(&endpoints), queue(&endpoints));
    drop(gone);
    assert_eq!(waiting(&endpoints), 2);
    drop(held);
    // It has been given the place, and goes away before it knows.
    drop(served_and_gone);
    assert!(last.now_or_never().unwrap().is_ok());
    assert_eq!((outstanding(&endpoints), waiting(&endpoints)), (vec![0], 0));
}

#[test]
fn a_retry_has_had_its_turn_and_one_that_waits_holds_up_only_whom_it_must() {
    let endpoints = endpoints(2, Limits { in_flight_max: 1, ..limits() });
    let failing = permit_of(&endpoints, 0);
    let other = permit_of(&endpoints, 1);
    let mut retry: Admission<'_> = endpoints.admit_elsewhere(|| NOW, 0).boxed();
    assert!((&mut retry).now_or_never().is_none());
    let mut next = queue(&endpoints);
    drop(failing);
    assert!((&mut retry).now_or_never().is_none(), "not the endpoint that failed it");
    assert!((&mut next).now_or_never().is_none());
    drop(retry);
    assert_eq!(next.now_or_never().unwrap().unwrap().index(), 0, "what the first avoided is free for the second");
    // With somebody in the queue, one that has had its turn takes what is free.
    let _first = permit_of(&endpoints, 0);
    let mut waits: Admission<'_> = endpoints.admit_elsewhere(|| NOW, 1).boxed();
    assert!((&mut waits).now_or_never().is_none());
    drop(other);
    assert!(endpoints.try_admit(NOW, None).is_none());
    assert_eq!(endpoints.try_admit(NOW, Some(0)).unwrap().index(), 1);
}

#[test]
fn an_endpoint_that_comes_back_is_given_to_those_that_wait() {
    // By an answer.
    let endpoints = endpoints(2, Limits { in_flight_max: 2, ..limits() });
    (0..2).for_each(|index| eject(&endpoints, index, NOW));
    let tried = permit_of(&endpoints, 0);
    let healthy = [permit_of(&endpoints, 1), permit_of(&endpoints, 1)];
    healthy[0].answered();
    let waits = queue(&endpoints);
    tried.answered();
    assert_eq!(waits.now_or_never().unwrap().unwrap().index(), 0);
    // By a probe.
    assert!((0..3).any(|_| endpoints.probed(0, false, NOW)));
    let waits = queue(&endpoints);
    assert!(endpoints.probed(0, true, NOW));
    assert_eq!(waits.now_or_never().unwrap().unwrap().index(), 0);
    // By the end of its ejection, although nothing happens at that moment.
    drop(tried);
    let ejected = Time(NOW.0 - EJECT_MS * 1_000 + 30_000);
    eject(&endpoints, 0, ejected);
    let started = Instant::now();
    let now = || Time(NOW.0 + started.elapsed().as_micros() as u64);
    let waited = block_on(endpoints.admit(now)).unwrap();
    assert_eq!(waited.index(), 0);
    assert!(now() >= ejected.plus_ms(EJECT_MS));
}

#[test]
fn under_threads_no_place_is_lost_given_twice_or_kept_from_those_that_wait() {
    const THREADS: usize = 8;
    const TURNS: usize = 2_000;
    let endpoints = endpoints(2, Limits { in_flight_max: 1, queue_max: THREADS, ..limits() });
    let (over_in, over) = mpsc::channel();
    let mut threads = Vec::new();
    for thread in 0..THREADS {
        let (endpoints, over_in) = (Arc::clone(&endpoints), over_in.clone());
        threads.push(thread::spawn(move || {
            for turn in 0..TURNS {
                if (thread + turn) % 7 == 0 {
                    // Comes, perhaps waits, and goes away.
                    drop(endpoints.admit(|| NOW).now_or_never());
                    continue;
                }
                let permit = block_on(endpoints.admit(|| NOW)).unwrap();
                // Others come meanwhile.
                thread::yield_now();
                over_in.send(endpoints.all()[permit.index()].outstanding.load(SeqCst)).unwrap();
                match turn % 5 {
                    0 => permit.failed(NOW),
                    1 => permit.answered(),
                    _ => {}
                }
            }
        }));
    }
    drop(over_in);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(over.iter().all(|outstanding| outstanding == 1));
    assert_eq!((outstanding(&endpoints), waiting(&endpoints)), (vec![0, 0], 0));
}
