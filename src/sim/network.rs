//! The network: a seeded machine of its own that says when a message arrives, and how often.
//!
//! It holds no messages. Whoever sends asks [`Network::send`] and is told none, one or two moments of arrival. Loss, delay and copies
//! are drawn from a generator for each direction of each pair, so that what happens to one pair does not depend on the others.

use fastrand::Rng;

/// How the network behaves for as long as no fault is planned. One in so many: 0 is never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weather {
    /// Shortest delay, in microseconds.
    pub delay_us_min: u64,
    /// What may come on top of it, in microseconds.
    pub delay_us_spread: u64,
    /// One message in so many is late: its delay is doubled up to [`DOUBLINGS_MAX`] times.
    pub late_one_in: u32,
    /// One message in so many is lost.
    pub lost_one_in: u32,
    /// One message in so many comes twice.
    pub twice_one_in: u32,
    /// Messages may overtake each other.
    pub overtaking: bool,
}

/// A late message's delay is doubled at most this often.
pub const DOUBLINGS_MAX: u32 = 13;
/// No message is later than this, in microseconds.
pub const DELAY_US_MAX: u64 = 8_000_000;

impl Weather {
    /// A local network on a good day.
    pub const CALM: Weather =
        Weather { delay_us_min: 100, delay_us_spread: 400, late_one_in: 0, lost_one_in: 0, twice_one_in: 0, overtaking: false };
}

/// What became of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// When it arrives, if it does.
    pub first: Option<u64>,
    /// When its copy arrives, if there is one.
    pub copy: Option<u64>,
    /// One that was sent before it arrives after it.
    pub overtakes: bool,
}

/// One direction of one pair.
#[derive(Clone, Debug)]
struct Way {
    rng: Rng,
    /// Planned cuts that are on.
    cuts: u32,
    /// Nothing arrives before this.
    clogged_until: u64,
    /// The last arrival.
    last: u64,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Network {
    weather: Weather,
    nodes: usize,
    ways: Vec<Way>,
}

fn one_in(rng: &mut Rng, n: u32) -> bool {
    n > 0 && rng.u32(0..n) == 0
}

impl Network {
    /// A network of so many nodes.
    pub fn new(seed: u64, nodes: usize, weather: Weather) -> Network {
        let mut seeds = Rng::with_seed(seed);
        let way = |_| Way { rng: Rng::with_seed(seeds.u64(..)), cuts: 0, clogged_until: 0, last: 0 };
        Network { weather, nodes, ways: (0..nodes * nodes).map(way).collect() }
    }

    fn way(&mut self, from: usize, to: usize) -> &mut Way {
        &mut self.ways[from * self.nodes + to]
    }

    /// A message is sent now, in microseconds: when does it arrive?
    pub fn send(&mut self, now: u64, from: usize, to: usize) -> Fate {
        let weather = self.weather;
        let way = self.way(from, to);
        if way.cuts > 0 || one_in(&mut way.rng, weather.lost_one_in) {
            return Fate::default();
        }
        let mut arrival = || {
            let mut delay = weather.delay_us_min + way.rng.u64(0..=weather.delay_us_spread);
            if one_in(&mut way.rng, weather.late_one_in) {
                delay = (delay << way.rng.u32(1..=DOUBLINGS_MAX)).min(DELAY_US_MAX);
            }
            let at = (now + delay).max(way.clogged_until);
            let overtakes = at < way.last;
            way.last = way.last.max(at);
            if weather.overtaking { (at, overtakes) } else { (way.last, false) }
        };
        let (first, overtakes) = arrival();
        let copy = if one_in(&mut self.way(from, to).rng, weather.twice_one_in) { Some(self.again(now, from, to)) } else { None };
        Fate { first: Some(first), copy, overtakes }
    }

    /// A copy takes its own time, whatever overtakes what.
    fn again(&mut self, now: u64, from: usize, to: usize) -> u64 {
        let weather = self.weather;
        let way = self.way(from, to);
        let delay = (weather.delay_us_min + way.rng.u64(0..=weather.delay_us_spread)) << way.rng.u32(0..=DOUBLINGS_MAX);
        (now + delay.min(DELAY_US_MAX)).max(way.clogged_until)
    }

    /// Cuts one direction. Cuts add up: each is to be mended.
    pub fn cut(&mut self, from: usize, to: usize) {
        self.way(from, to).cuts += 1;
    }

    /// Mends one cut.
    pub fn mend(&mut self, from: usize, to: usize) {
        let way = self.way(from, to);
        way.cuts = way.cuts.saturating_sub(1);
    }

    /// Nothing arrives before `until`, in microseconds.
    pub fn clog(&mut self, from: usize, to: usize, until: u64) {
        let way = self.way(from, to);
        way.clogged_until = way.clogged_until.max(until);
    }

    /// Whether a connection between the two could be made: both directions are whole.
    pub fn connects(&self, one: usize, other: usize) -> bool {
        [one * self.nodes + other, other * self.nodes + one].iter().all(|way| self.ways[*way].cuts == 0)
    }

    /// Whether anything gets through in this direction.
    pub fn passes(&self, from: usize, to: usize) -> bool {
        self.ways[from * self.nodes + to].cuts == 0
    }

    /// From now on calm, and every direction whole but those that `stays_cut` names.
    pub fn heal(&mut self, stays_cut: impl Fn(usize, usize) -> bool) {
        self.weather = Weather::CALM;
        for from in 0..self.nodes {
            for to in 0..self.nodes {
                let way = self.way(from, to);
                way.cuts = u32::from(stays_cut(from, to));
                (way.clogged_until, way.last) = (0, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUGH: Weather =
        Weather { delay_us_min: 200, delay_us_spread: 800, late_one_in: 10, lost_one_in: 10, twice_one_in: 10, overtaking: true };

    fn fates(seed: u64, weather: Weather) -> Vec<Fate> {
        let mut network = Network::new(seed, 3, weather);
        (0..1_000).map(|n| network.send(n * 100, 0, 1)).collect()
    }

    #[test]
    fn the_same_seed_is_the_same_network_and_another_is_another() {
        assert_eq!(fates(7, ROUGH), fates(7, ROUGH));
        assert_ne!(fates(7, ROUGH), fates(8, ROUGH));
    }

    #[test]
    fn messages_are_lost_copied_late_and_overtaken() {
        let fates = fates(7, ROUGH);
        let lost = fates.iter().filter(|fate| fate.first.is_none()).count();
        let copies = fates.iter().filter(|fate| fate.copy.is_some()).count();
        assert!((50..200).contains(&lost) && (50..200).contains(&copies), "{lost} lost, {copies} copies");
        let delays = fates.iter().enumerate().filter_map(|(n, fate)| Some(fate.first? - n as u64 * 100));
        let (shortest, longest) = (delays.clone().min().unwrap(), delays.max().unwrap());
        assert!(shortest >= 200 && longest > 100_000 && longest <= DELAY_US_MAX, "{shortest} to {longest}");
        let arrivals: Vec<_> = fates.iter().filter_map(|fate| fate.first).collect();
        assert!(arrivals.windows(2).any(|pair| pair[0] > pair[1]), "nothing was overtaken");
    }

    #[test]
    fn without_overtaking_messages_arrive_in_the_order_sent() {
        let arrivals: Vec<_> = fates(7, Weather { overtaking: false, ..ROUGH }).iter().filter_map(|fate| fate.first).collect();
        assert!(arrivals.windows(2).all(|pair| pair[0] <= pair[1]));
    }

    #[test]
    fn a_cut_is_one_way_and_cuts_add_up() {
        let mut network = Network::new(1, 3, Weather::CALM);
        network.cut(0, 1);
        network.cut(0, 1);
        assert_eq!(network.send(0, 0, 1), Fate::default());
        assert!(network.send(0, 1, 0).first.is_some());
        assert!(!network.connects(1, 0));
        network.mend(0, 1);
        assert_eq!(network.send(0, 0, 1), Fate::default());
        network.mend(0, 1);
        assert!(network.send(0, 0, 1).first.is_some() && network.connects(0, 1));
    }

    #[test]
    fn a_clog_holds_messages_back_and_a_heal_ends_all() {
        let mut network = Network::new(1, 3, Weather::CALM);
        network.clog(0, 1, 1_000_000);
        assert!(network.send(0, 0, 1).first.unwrap() >= 1_000_000);
        network.cut(1, 2);
        network.heal(|from, to| from == 2 || to == 2);
        assert!(network.send(0, 0, 1).first.unwrap() < 1_000);
        assert_eq!(network.send(0, 1, 2), Fate::default());
        network.mend(1, 2);
        assert!(network.send(0, 1, 2).first.is_some());
    }
}
