//! The ends of agents and of their workers.

use ferroelastic_core::rendezvous::member::{self, Call};
use ferroelastic_core::rendezvous::policy::{FailureFacts, RestartVerdict};

use super::{Happening, Job, Work, invariants};

impl Job {
    pub(super) fn workers_are_gone(&mut self, index: usize, turn: u64) {
        if self.agents[index].turn != turn || !self.agents[index].is_alive {
            return;
        }
        if let Work::Stopping { has_failed: true } = self.agents[index].work {
            self.set_work(index, Work::Verdict);
            // It looks at how it stands.
            self.step_agent(index, member::MemberEvent::Tick);
        } else {
            self.set_work(index, Work::Meeting);
            self.ask_to_join(index);
        }
    }

    pub(super) fn leave(&mut self, index: usize) {
        if self.agents[index].is_alive {
            self.set_work(index, Work::Ended("left"));
            self.step_agent(index, member::MemberEvent::Call(Call::Leave("it was told to end".into())));
            self.agents[index].is_alive = false;
        }
    }

    pub(super) fn kill(&mut self, index: usize) {
        if !self.agents[index].is_alive {
            return;
        }
        self.agents[index].is_alive = false;
        self.agents[index].work = Work::Ended("killed");
        // The kernel says so, unless the power is gone.
        if let Some(link) = self.agents[index].link
            && self.random.chance(70)
        {
            let at = self.arrival(index, link, true);
            self.later(at, Happening::HostSeesEnd(link));
        }
    }

    pub(super) fn workers_end(&mut self, index: usize, turn: u64, fails: bool) {
        let agent = &self.agents[index];
        let Work::Running(place) = agent.work.clone() else { return };
        if agent.turn != turn || !agent.is_alive {
            return;
        }
        if fails {
            let is_final = self.random.chance(self.faults.last);
            let verdict = if is_final { RestartVerdict::Exhausted } else { RestartVerdict::Default };
            let facts = FailureFacts { status: Some(1), verdict, ..FailureFacts::default() };
            let (text, detail) = (invariants::FAILURE.into(), invariants::DETAIL.into());
            let call = Call::Failed { at_ns: 1, text, code: 1, facts, detail };
            self.step_agent(index, member::MemberEvent::Call(call));
            if self.agents[index].is_alive && self.agents[index].turn == turn {
                self.stop_workers(index, true);
            }
        } else {
            self.set_work(index, Work::Barrier(place));
            self.step_agent(index, member::MemberEvent::Call(Call::Finished));
        }
    }
}
