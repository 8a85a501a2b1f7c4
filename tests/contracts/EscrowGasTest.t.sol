// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Acceptance, Claim, Job} from "../../contracts/src/interfaces/IEscrow.sol";
import {Market} from "./Market.t.sol";

interface Cooler {
    function cool(address account) external; // makes an account's storage cold again, as in a transaction of its own
}

/// @title The largest job: 64 stages, each convicted by 8 different winners
contract EscrowGasTest is Market {
    uint256 private constant COUNT = 64;
    uint256 private constant TRANSACTION_GAS = 2 ** 24; // EIP-7825

    bytes32 private expired;
    bytes32 private opened;
    bytes32 private accepted;
    bytes32 private settled;
    bytes32 private released;

    /// @dev forge runs setUp as a transaction of its own, so its writes are old when the tests measure.
    function setUp() public {
        _deploy(address(this));
        Job memory job = _job(_pipeline(COUNT));
        opened = _open(job);
        job.nonce = 2;
        accepted = _accepted(job);
        job.nonce = 3;
        settled = _accepted(job);
        escrow.commit(settled, _claims(settled, COUNT, 20));
        job.nonce = 4;
        expired = _accepted(job);
        job.nonce = 5;
        released = _accepted(job);
        escrow.commit(released, _claims(released, COUNT, 20));
        for (uint8 stage; stage < COUNT; ++stage) {
            for (uint256 i; i < 8; ++i) {
                escrow.gameOpened(released, stage);
                // The youngest first, so that sorting is dearest.
                address winner = address(uint160(0xD000 + uint256(stage) * 8 + i));
                escrow.gameClosed(released, stage, stage, winner, START - uint64(i), 250_000);
            }
        }
    }

    function test_accept_ofTheLargestJobFitsATransaction() public {
        Acceptance[] memory list = _acceptances(opened, COUNT);
        _cool();
        uint256 before = gasleft();
        escrow.accept(opened, list);
        _expectFits(before - gasleft(), abi.encode(list).length);
    }

    function test_commit_ofTheLargestJobFitsATransaction() public {
        Claim[] memory list = _claims(accepted, COUNT, 20);
        _cool();
        uint256 before = gasleft();
        escrow.commit(accepted, list);
        _expectFits(before - gasleft(), abi.encode(list).length);
    }

    function test_settle_ofTheLargestJobFitsATransaction() public {
        vm.warp(START + 61);
        _cool();
        uint256 before = gasleft();
        escrow.settle(settled);
        _expectFits(before - gasleft(), 36);
    }

    function test_expire_ofTheLargestJobFitsATransaction() public {
        vm.warp(START + 201);
        _cool();
        uint256 before = gasleft();
        escrow.expire(expired);
        _expectFits(before - gasleft(), 36);
    }

    function test_release_ofTheLargestJobFitsATransaction() public {
        vm.warp(START + 61);
        _cool();
        uint256 before = gasleft();
        escrow.release(released);
        _expectFits(before - gasleft(), 36);
    }

    function _accepted(Job memory job) private returns (bytes32 id) {
        id = _open(job);
        escrow.accept(id, _acceptances(id, COUNT));
    }

    function _cool() private {
        Cooler(address(vm)).cool(address(escrow));
        Cooler(address(vm)).cool(address(workers));
        Cooler(address(vm)).cool(address(token));
    }

    /// @dev The rest of a transaction: 21,000 and 40 for each byte of calldata.
    function _expectFits(uint256 gas, uint256 calldataBytes) private pure {
        if (gas + 21_000 + 40 * calldataBytes > TRANSACTION_GAS) assertEq(gas, TRANSACTION_GAS, "gas");
    }
}
