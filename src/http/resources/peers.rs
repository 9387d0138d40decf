//! `GET /peers`: the other nodes as seen from here.

use tide::Request;

use crate::http::app::{State, json};

/// Every other node of peers.json, its link and what is known of it.
pub(crate) async fn list(request: Request<State>) -> tide::Result {
    json(200, &request.state().control.peers())
}

#[cfg(test)]
mod tests {
    use crate::http::fakes::{Fake, get};

    #[test]
    fn the_peers_are_listed_with_their_links() {
        let answer = get(Fake::default(), "/peers").json();
        assert_eq!((&answer["node"], &answer["peers"][0]["link"]), (&"node-a".into(), &"up".into()));
    }
}
