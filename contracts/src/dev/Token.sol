// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// @title A plain ERC-20 for development chains
/// @notice Anybody may mint: it is worth nothing, and no live chain deploys it.
contract Token is ERC20 {
    constructor() ERC20("Plumb development token", "DEV") {}

    function mint(address account, uint256 amount) external {
        _mint(account, amount);
    }
}
