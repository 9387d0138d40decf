//! `GET /rollouts`: the rollout driver's work. There is no driver yet, so there is none of it.

use tide::Request;
use tide::prelude::json as value;

use crate::http::Refusal;
use crate::http::app::{State, json};

/// The rollouts.
pub(crate) async fn list(_: Request<State>) -> tide::Result {
    json(200, &value!({ "rollouts": [] }))
}

/// One rollout.
pub(crate) async fn show(request: Request<State>) -> tide::Result {
    let sentence = format!("there is no rollout {:?}; GET /rollouts lists them", request.param("id")?);
    Err(Refusal::new(404, "unknown_rollout", sentence).into())
}

#[cfg(test)]
mod tests {
    use crate::http::fakes::{Fake, get};

    #[test]
    fn there_are_no_rollouts() {
        assert_eq!(get(Fake::default(), "/rollouts").body, r#"{"rollouts":[]}"#);
        assert_eq!(get(Fake::default(), "/rollouts/7").error(), (404, "unknown_rollout".into()));
    }
}
