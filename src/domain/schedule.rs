//! Whose turn it is: the order in which the waiting jobs of one kind are leased. It follows from
//! who waits, who runs and what was leased before, and from nothing else.
//!
//! Between classes it is start-time fair queueing (Goyal, Vin, Cheng 1996): of ten leases six go to
//! premium, three to standard and one to batch while all of them wait, and a class that waits alone
//! gets all. Inside a class the user with the fewest running jobs is next, and among equals the one
//! whose last turn, or whose oldest waiting job if that is younger, lies furthest back. A user's own
//! jobs keep their order.

use std::collections::HashMap;

use super::ids::{JobId, UserId};
use super::tier::{Caps, Class};

/// The jobs of one kind that wait or run.
#[derive(Debug, Clone, Default)]
pub struct Schedule {
    lines: [Line; 3],
}

/// What a class has had so far, in units of which a worker hands out one to a premium job, two to
/// a standard job and six to a batch job.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// Where its last lease began.
    pub start: u64,
    /// Where its next one begins if nobody is further.
    pub next: u64,
}

impl Share {
    /// Takes in that a job of `class` was leased.
    pub fn take(shares: &mut [Self; 3], class: Class) {
        let start = now(shares).max(shares[class as usize].next);
        shares[class as usize] = Self { start, next: start + stride(class) };
    }
}

/// How far the class that was served last was: one that has been idle begins here, and is owed
/// nothing for it.
fn now(shares: &[Share; 3]) -> u64 {
    shares.iter().map(|share| share.start).max().unwrap_or_default()
}

/// The inverse of the weights 6, 3 and 1.
fn stride(class: Class) -> u64 {
    match class {
        Class::Premium => 1,
        Class::Standard => 2,
        Class::Batch => 6,
    }
}

/// The jobs of one class.
#[derive(Debug, Clone, Default)]
struct Line {
    share: Share,
    users: HashMap<UserId, Standing>,
}

#[derive(Debug, Clone, Default)]
struct Standing {
    /// Where each was requested, and which it is; in this order.
    waiting: Vec<(u64, JobId)>,
    running: u64,
    /// Where its last lease lies in the log; 0 if it never had one.
    served: u64,
}

impl Standing {
    /// From when on it waits for its turn. No two users have the same: each position is one event.
    fn since(&self) -> u64 {
        self.waiting.first().map_or(self.served, |(position, _)| self.served.max(*position))
    }

    /// How many of its waiting jobs start below a level. The job behind `k` others of its user
    /// starts at level `running + k`: that many of the user's jobs run by then.
    fn below(&self, level: u64) -> u64 {
        (self.waiting.len() as u64).min(level.saturating_sub(self.running))
    }
}

impl Schedule {
    /// A job waits; `position` is where it was requested, or retried by its user.
    pub fn wait(&mut self, class: Class, user: &UserId, position: u64, job: JobId) {
        let waiting = &mut self.standing(class, user).waiting;
        if let Err(index) = waiting.binary_search_by_key(&position, |(position, _)| *position) {
            waiting.insert(index, (position, job));
        }
    }

    /// It waits no longer.
    pub fn leave(&mut self, class: Class, user: &UserId, position: u64) {
        let waiting = &mut self.standing(class, user).waiting;
        if let Ok(index) = waiting.binary_search_by_key(&position, |(position, _)| *position) {
            waiting.remove(index);
        }
        self.forget_idle(class, user);
    }

    /// One more of the user's jobs runs.
    pub fn run(&mut self, class: Class, user: &UserId) {
        self.standing(class, user).running += 1;
    }

    /// One less.
    pub fn end(&mut self, class: Class, user: &UserId) {
        let standing = self.standing(class, user);
        standing.running = standing.running.saturating_sub(1);
        self.forget_idle(class, user);
    }

    /// The user's last lease lies at `position`.
    pub fn serve(&mut self, class: Class, user: &UserId, position: u64) {
        let standing = self.standing(class, user);
        standing.served = standing.served.max(position);
        self.forget_idle(class, user);
    }

    pub fn set_shares(&mut self, shares: [Share; 3]) {
        for (line, share) in self.lines.iter_mut().zip(shares) {
            line.share = share;
        }
    }

    pub fn shares(&self) -> [Share; 3] {
        [0, 1, 2].map(|class| self.lines[class].share)
    }

    /// The job whose turn it is, passing over those of users at their cap and those that `skip`
    /// names; with its class and where its user's turn lies, by which schedules can be compared.
    pub fn next(&self, caps: &Caps, skip: impl Fn(JobId) -> bool) -> Option<JobId> {
        let starts = self.starts();
        let mut classes = Class::ALL;
        classes.sort_by_key(|class| starts[*class as usize]);
        classes.into_iter().find_map(|class| {
            let of_user = |standing: &Standing| {
                let job = standing.waiting.iter().map(|(_, job)| *job).find(|job| !skip(*job))?;
                Some(((standing.running, standing.since()), job))
            };
            let cap = u64::from(caps.of(class));
            let users = self.lines[class as usize].users.values();
            let free = users.filter(|standing| standing.running < cap);
            free.filter_map(of_user).min_by_key(|(turn, _)| *turn).map(|(_, job)| job)
        })
    }

    /// From 1: how many leases until it is this job's turn if nothing else happens. Jobs above
    /// their users' cap come last, in the order in which they would go if the caps were lifted.
    /// Takes time by the number of users who wait.
    pub fn place(&self, caps: &Caps, class: Class, user: &UserId, position: u64) -> Option<u64> {
        let line = &self.lines[class as usize];
        let standing = line.users.get(user)?;
        let behind = standing.waiting.binary_search_by_key(&position, |(position, _)| *position);
        let level = standing.running + behind.ok()? as u64;
        let index = line.ahead(standing, level);
        let free = Class::ALL.map(|class| {
            let cap = u64::from(caps.of(class));
            self.lines[class as usize].users.values().map(|it| it.below(cap)).sum::<u64>()
        });
        let starts = self.starts();
        if level < u64::from(caps.of(class)) {
            return Some(1 + merged(class, index, starts, free));
        }
        let all = Class::ALL.map(|class| {
            let users = self.lines[class as usize].users.values();
            users.map(|standing| standing.waiting.len() as u64).sum::<u64>()
        });
        let held = [0, 1, 2].map(|class| all[class] - free[class]);
        let starts = self.starts_after(free, starts);
        let index = index - free[class as usize];
        Some(1 + free.iter().sum::<u64>() + merged(class, index, starts, held))
    }

    /// Where each class's next lease begins.
    fn starts(&self) -> [u64; 3] {
        let shares = self.shares();
        let now = now(&shares);
        shares.map(|share| now.max(share.next))
    }

    /// The same once each class had so many leases more.
    fn starts_after(&self, leases: [u64; 3], starts: [u64; 3]) -> [u64; 3] {
        let mut shares = self.shares();
        for class in Class::ALL {
            let (class, stride) = (class as usize, stride(class));
            if let Some(before_last) = leases[class].checked_sub(1) {
                let start = starts[class] + before_last * stride;
                shares[class] = Share { start, next: start + stride };
            }
        }
        let now = now(&shares);
        shares.map(|share| now.max(share.next))
    }

    fn standing(&mut self, class: Class, user: &UserId) -> &mut Standing {
        let users = &mut self.lines[class as usize].users;
        if !users.contains_key(user) {
            users.insert(user.clone(), Standing::default());
        }
        users.get_mut(user).expect("it was put there if it was missing")
    }

    /// Who neither waits nor runs takes no room. When such a user's last turn was is told anew
    /// with its next job.
    fn forget_idle(&mut self, class: Class, user: &UserId) {
        let users = &mut self.lines[class as usize].users;
        if users.get(user).is_some_and(|it| it.waiting.is_empty() && it.running == 0) {
            users.remove(user);
        }
    }
}

impl Line {
    /// How many jobs of the class go before the one of `user` at `level`.
    ///
    /// Levels are served one after the other. At each, those who come to it without a lease since
    /// go first, in the order in which they wait; the others follow in the order in which they were
    /// served at the level before, which by the same rule is by running jobs, the most first.
    fn ahead(&self, user: &Standing, level: u64) -> u64 {
        let mine = (user.running, std::cmp::Reverse(user.since()));
        self.users
            .values()
            .map(|it| {
                let at_level = it.below(level + 1) > it.below(level);
                let first = (it.running, std::cmp::Reverse(it.since())) > mine;
                it.below(level) + u64::from(at_level && first)
            })
            .sum()
    }
}

/// How many leases lie before the one with this index in its class, when each class still has so
/// many.
fn merged(class: Class, index: u64, starts: [u64; 3], counts: [u64; 3]) -> u64 {
    let begin = starts[class as usize] + index * stride(class);
    let before = |other: Class| {
        let (start, stride) = (starts[other as usize], stride(other));
        // Equal beginnings: the class that comes first in `Class::ALL` goes first.
        let end = begin + u64::from((other as usize) < class as usize);
        end.saturating_sub(start).div_ceil(stride).min(counts[other as usize])
    };
    index + Class::ALL.into_iter().filter(|other| *other != class).map(before).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use uuid::Uuid;

    fn user(n: u8) -> UserId {
        UserId::try_from(format!("user_{n}")).unwrap()
    }

    fn job(n: u64) -> JobId {
        JobId(Uuid::from_u128(u128::from(n)))
    }

    /// A schedule with the log position at which it stands.
    #[derive(Clone, Default)]
    struct World {
        schedule: Schedule,
        jobs: HashMap<JobId, (Class, UserId, u64)>,
        position: u64,
    }

    impl World {
        fn ask(&mut self, class: Class, n: u8) -> JobId {
            self.position += 1;
            let id = job(self.position);
            self.schedule.wait(class, &user(n), self.position, id);
            self.jobs.insert(id, (class, user(n), self.position));
            id
        }

        fn lease(&mut self, caps: &Caps) -> Option<JobId> {
            let id = self.schedule.next(caps, |_| false)?;
            let (class, user, queued) = self.jobs.remove(&id).unwrap();
            self.position += 1;
            self.schedule.run(class, &user);
            self.schedule.serve(class, &user, self.position);
            self.schedule.leave(class, &user, queued);
            let mut shares = self.schedule.shares();
            Share::take(&mut shares, class);
            self.schedule.set_shares(shares);
            Some(id)
        }

        /// Leases so many, each of which ends at once; whose they were.
        fn turns(&mut self, caps: &Caps, count: usize) -> Vec<(Class, UserId)> {
            let mut turns = vec![];
            for _ in 0..count {
                let jobs = self.jobs.clone();
                let Some(id) = self.lease(caps) else { break };
                let (class, user, _) = jobs[&id].clone();
                self.schedule.end(class, &user);
                turns.push((class, user));
            }
            turns
        }
    }

    const NO_CAPS: Caps = Caps { premium: u32::MAX, standard: u32::MAX, batch: u32::MAX };

    #[test]
    fn of_ten_leases_six_are_premium_three_standard_and_one_is_batch() {
        let mut world = World::default();
        for _ in 0..200 {
            for class in Class::ALL {
                world.ask(class, 1);
            }
        }
        let turns = world.turns(&NO_CAPS, 300);
        for ten in turns.chunks(10) {
            let count = |class| ten.iter().filter(|(it, _)| *it == class).count();
            assert_eq!(Class::ALL.map(count), [6, 3, 1]);
        }
        assert_eq!(turns[0].0, Class::Premium);
    }

    #[test]
    fn a_class_alone_gets_all_and_is_owed_nothing_afterwards() {
        let mut world = World::default();
        for _ in 0..100 {
            world.ask(Class::Batch, 1);
        }
        assert_eq!(world.turns(&NO_CAPS, 50).len(), 50);
        for _ in 0..20 {
            world.ask(Class::Premium, 2);
        }
        let classes: Vec<_> =
            world.turns(&NO_CAPS, 8).into_iter().map(|(class, _)| class).collect();
        assert_eq!(
            classes.iter().filter(|class| **class == Class::Batch).count(),
            1,
            "{classes:?}"
        );
    }

    #[test]
    fn a_thousand_jobs_of_one_user_do_not_hold_up_the_one_job_of_another() {
        let mut world = World::default();
        for _ in 0..1000 {
            world.ask(Class::Standard, 1);
        }
        world.turns(&NO_CAPS, 10);
        world.ask(Class::Standard, 2);
        assert_eq!(world.turns(&NO_CAPS, 2)[1].1, user(2), "after the one who waits longer");
    }

    #[test]
    fn newcomers_do_not_starve_one_who_was_served_before() {
        let mut world = World::default();
        for _ in 0..3 {
            world.ask(Class::Standard, 0);
        }
        world.turns(&NO_CAPS, 1);
        let mut waited = 0;
        for newcomer in 1..100 {
            world.ask(Class::Standard, newcomer);
            world.ask(Class::Standard, newcomer);
            if world.turns(&NO_CAPS, 1)[0].1 == user(0) {
                break;
            }
            waited += 1;
        }
        assert!(waited <= 1, "{waited}");
    }

    #[test]
    fn who_is_at_the_cap_is_passed_over_until_a_job_of_theirs_ends() {
        let caps = Caps { standard: 2, ..NO_CAPS };
        let mut world = World::default();
        let mine: Vec<_> = (0..3).map(|_| world.ask(Class::Standard, 1)).collect();
        let other = world.ask(Class::Standard, 2);
        let places = |world: &World| {
            let place = |id: &JobId| {
                let (class, user, position) = world.jobs.get(id)?;
                world.schedule.place(&caps, *class, user, *position)
            };
            [&mine[0], &mine[1], &mine[2], &other].map(place)
        };
        assert_eq!(places(&world), [Some(1), Some(3), Some(4), Some(2)]);
        for expected in [mine[0], other, mine[1]] {
            assert_eq!(world.lease(&caps), Some(expected));
        }
        assert_eq!(world.lease(&caps), None);
        world.schedule.end(Class::Standard, &user(1));
        assert_eq!(places(&world)[2], Some(1));
        assert_eq!(world.lease(&caps), Some(mine[2]));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Ask(usize, u8),
        Lease,
        End(usize, u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..3usize, 0..6u8).prop_map(|(class, user)| Step::Ask(class, user)),
            1 => Just(Step::Lease),
            1 => (0..3usize, 0..6u8).prop_map(|(class, user)| Step::End(class, user)),
        ]
    }

    fn after(steps: &[Step], caps: &Caps) -> World {
        let mut world = World::default();
        for step in steps {
            match step {
                Step::Ask(class, n) => drop(world.ask(Class::ALL[*class], *n)),
                Step::Lease => drop(world.lease(caps)),
                Step::End(class, n) => world.schedule.end(Class::ALL[*class], &user(*n)),
            }
        }
        world
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

        /// The number that a user is shown is the number of leases until its turn.
        #[test]
        fn each_place_is_the_turn_that_comes(
            steps in prop::collection::vec(step(), 0..120),
            caps in (1..5u32, 1..5u32, 1..5u32),
        ) {
            let caps = Caps { premium: caps.0, standard: caps.1, batch: caps.2 };
            let mut world = after(&steps, &caps);
            let said: HashMap<JobId, u64> = world
                .jobs
                .iter()
                .map(|(id, (class, user, at))| {
                    (*id, world.schedule.place(&caps, *class, user, *at).unwrap())
                })
                .collect();
            let mut turn = 0;
            // First what the caps allow; then as if they were lifted.
            while let Some(id) = world.lease(&caps).or_else(|| world.lease(&NO_CAPS)) {
                turn += 1;
                prop_assert_eq!(said[&id], turn);
            }
            prop_assert_eq!(said.len() as u64, turn);
        }

        /// Nobody waits for more than a few rounds, whatever the others ask for.
        #[test]
        fn nobody_starves(
            steps in prop::collection::vec(step(), 0..60),
            others in prop::collection::vec((0..3usize, 0..6u8), 200..400),
            class in 0..3usize,
        ) {
            let mut world = after(&steps, &NO_CAPS);
            for class in Class::ALL {
                for n in 0..6 {
                    while world.schedule.lines[class as usize]
                        .users.get(&user(n)).is_some_and(|it| it.running > 0)
                    {
                        world.schedule.end(class, &user(n));
                    }
                }
            }
            let mine = world.ask(Class::ALL[class], 9);
            let mut waited = 0;
            for (class, n) in others {
                world.ask(Class::ALL[class], n);
                world.turns(&NO_CAPS, 1);
                if !world.jobs.contains_key(&mine) {
                    break;
                }
                waited += 1;
            }
            // Six others in the class, each once, and its class at least every tenth time.
            prop_assert!(waited <= 80, "waited for {} leases", waited);
        }
    }

    #[test]
    fn who_neither_waits_nor_runs_takes_no_room() {
        let mut schedule = Schedule::default();
        let known = |schedule: &Schedule| schedule.lines[Class::Batch as usize].users.len();
        schedule.wait(Class::Batch, &user(1), 1, job(1));
        schedule.run(Class::Batch, &user(1));
        schedule.leave(Class::Batch, &user(1), 1);
        assert_eq!(known(&schedule), 1, "it runs");
        schedule.end(Class::Batch, &user(1));
        assert_eq!(known(&schedule), 0);
        schedule.serve(Class::Batch, &user(2), 2);
        assert_eq!(known(&schedule), 0);
    }

    #[test]
    fn a_job_that_a_place_cannot_be_given_for_gets_none_and_a_skipped_one_is_passed_over() {
        let mut world = World::default();
        let first = world.ask(Class::Standard, 1);
        let second = world.ask(Class::Standard, 1);
        let next = |skipped| world.schedule.next(&NO_CAPS, |id| id == skipped);
        assert_eq!(next(first), Some(second));
        assert_eq!(next(second), Some(first));
        let place =
            |n, position| world.schedule.place(&NO_CAPS, Class::Standard, &user(n), position);
        assert_eq!((place(1, 9), place(2, 1)), (None, None));
    }
}
