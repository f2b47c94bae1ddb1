"""The book of addresses: bounded, and what strangers say of a peer never outweighs what it says itself."""

from __future__ import annotations

from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.addresses import AddressBook


def peer(number: int) -> PeerID:
    return PeerID.from_public_key(number.to_bytes(32, "big"))


def at(number: int) -> Multiaddr:
    return Multiaddr("ip4", "10.0.0.1", number)


def test_the_newest_address_comes_first_and_the_oldest_are_forgotten() -> None:
    book = AddressBook(max_peers=10, max_addresses=3)
    for number in range(1, 6):
        book.add(peer(0), [at(number)])
    assert book.get(peer(0)) == [at(5), at(4), at(3)]
    book.prefer(peer(0), at(4))
    assert book.get(peer(0)) == [at(4), at(5), at(3)]


def test_what_cannot_be_dialed_is_left_out() -> None:
    book = AddressBook(max_peers=10, max_addresses=3)
    book.add(peer(0), [at(0), Multiaddr("ip6", "::", 1), at(7).with_peer_id(peer(0))])
    assert book.get(peer(0)) == [at(7)]


def test_addresses_that_others_can_use_are_kept() -> None:
    book = AddressBook(max_peers=10, max_addresses=3)
    quic = Multiaddr("/ip4/10.0.0.1/udp/4001/quic-v1")
    book.add(peer(0), [quic, at(7)])
    assert book.get(peer(0)) == [quic, at(7)]


def test_hearsay_comes_after_what_is_known_and_displaces_none_of_it() -> None:
    book = AddressBook(max_peers=10, max_addresses=3)
    book.add(peer(0), [at(1), at(2)])
    book.add_hearsay(peer(0), [at(number) for number in range(100, 120)])
    assert book.get(peer(0)) == [at(1), at(2), at(100), at(101), at(102)]
    book.prefer(peer(0), at(101))
    assert book.get(peer(0)) == [at(101), at(1), at(2), at(100), at(102)]


def test_hearsay_of_many_peers_makes_none_of_those_forgotten_that_said_it_themselves() -> None:
    book = AddressBook(max_peers=10, max_addresses=3)
    book.add(peer(0), [at(1)])
    for number in range(1, 1000):
        book.add_hearsay(peer(number), [at(number)])
    assert book.get(peer(0)) == [at(1)]
    assert len(book) == 11
